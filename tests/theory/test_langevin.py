"""Noisy optimizers: the Gibbs minimisers they sample, and what a torch optimizer owes its user."""

import copy
import math
import pickle

import pytest
import torch

from recipes.theory.measures import DECAY, MEAN, TEMPERATURE, exact_gap, particles
from torch_meanfield.theory.dual_averaging import ParticleDualAveraging
from torch_meanfield.theory.langevin import MeanFieldLangevin


def test_langevin_samples_the_gibbs_minimiser():
    _, theta = particles("langevin", 20_000, 300, lr=0.02)
    assert theta.mean().item() == pytest.approx(MEAN, abs=0.02)
    # steps of 0.02 leave a variance of T / (decay (1 - lr decay / 2))
    assert theta.var().item() == pytest.approx(TEMPERATURE / DECAY / (1 - 0.01 * DECAY), rel=0.04)
    z = (theta - theta.mean()) / theta.std()
    assert abs(z.pow(3).mean()) < 0.1 and z.pow(4).mean().item() == pytest.approx(3, abs=0.2)


def test_langevin_follows_the_mean_field_equation():
    gaps, _ = particles("langevin", 20_000, 100, lr=0.01)
    predicted = exact_gap(0.01 * torch.arange(101), -1.0, 1.0)
    measured = torch.tensor(gaps, dtype=torch.float64)
    assert ((measured - predicted).abs() < 0.08 * predicted + 1e-3).all() and predicted[-1] < 0.02 * predicted[0]


def test_dual_averaging_finds_the_gibbs_minimiser_at_its_rate():
    gaps, theta = particles("dual averaging", 10_000, 60, lr=0.02)
    assert theta.mean().item() == pytest.approx(MEAN, abs=0.03)
    # the average weighs the decay by t / (t + 2)
    assert theta.var().item() == pytest.approx(TEMPERATURE / DECAY * 62 / 60, rel=0.06)
    assert all(gap * t < 2 * gaps[1] for t, gap in enumerate(gaps) if t)


def test_dual_averages_are_those_of_the_definition():
    theta = torch.zeros(3, requires_grad=True)
    optimizer = ParticleDualAveraging([theta], 0.1, temperature=1e-3, inner_steps=1, particles=3)
    seen = []

    def closure():
        outputs = theta * torch.tensor([1.0, 2.0, 3.0])
        return (outputs - 1).pow(3).sum(), outputs

    for t in range(1, 5):
        seen.append(3 * (closure()[1].detach() - 1).square())
        optimizer.step(closure)
        wanted = sum(2 * s * d for s, d in enumerate(seen, 1)) / ((t + 1) * (t + 2))
        torch.testing.assert_close(optimizer.state_dict()["dual"]["average"], wanted)


MAKERS = {
    "langevin": lambda params, **more: MeanFieldLangevin(params, 0.1, temperature=0.5, **more),
    "dual": lambda params, **more: ParticleDualAveraging(params, 0.1, temperature=0.5, inner_steps=2, **more),
}


def advance(optimizer, theta, steps):
    def loss_and_outputs():
        outputs = theta.mean()[None]
        return (outputs - 1).square().sum(), outputs

    def closure():
        optimizer.zero_grad()
        loss = loss_and_outputs()[0]
        loss.backward()
        return loss

    for _ in range(steps):
        loss = optimizer.step(closure if isinstance(optimizer, MeanFieldLangevin) else loss_and_outputs)
    return loss


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_a_resumed_run_is_the_same_run(name, how, tmp_path):
    theta = torch.zeros(4, requires_grad=True)
    optimizer = MAKERS[name]([theta], seed=3)
    advance(optimizer, theta, 3)
    if how == "state_dict":
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        other_theta = theta.detach().clone().requires_grad_()
        other = MAKERS[name]([other_theta], seed=9)
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    else:
        other = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        other_theta = other.param_groups[0]["params"][0]
    advance(optimizer, theta, 3)
    advance(other, other_theta, 3)
    assert torch.equal(theta, other_theta)


@pytest.mark.parametrize("name", MAKERS)
def test_the_generator_is_its_own(name):
    ends = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(ends))
        before = torch.get_rng_state()
        theta = torch.zeros(4, requires_grad=True)
        loss = advance(MAKERS[name]([theta], seed=seed), theta, 2)
        assert torch.equal(torch.get_rng_state(), before) and torch.isfinite(loss)
        ends.append(theta.detach())
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_groups_closures_and_schedulers():
    cold, warm, idle = (torch.zeros(50, requires_grad=True) for _ in range(3))
    optimizer = MeanFieldLangevin(
        [{"params": [cold], "temperature": 0.0, "weight_decay": 2.0}, {"params": [warm, idle]}], 0.1, temperature=1.0
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure():
        loss = cold.sum() + warm.sum()
        loss.backward()
        return loss

    with torch.no_grad():
        cold.fill_(1.0)
    assert optimizer.step(closure).item() == 50.0
    assert torch.equal(cold, torch.full((50,), 1 - 0.1 * (1 + 2.0)))
    assert warm.std() > 0.2 and not idle.any()  # no gradient, no step
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("make", MAKERS.values())
def test_bad_arguments(make):
    theta = torch.zeros(2, requires_grad=True)
    for name, value, error in (
        ("weight_decay", -1.0, ValueError),
        ("particles", 0, ValueError),
        ("particles", math.inf, ValueError),
        ("weight_decay", "much", TypeError),
        ("seed", 0.5, TypeError),
    ):
        with pytest.raises(error, match=name):
            make([theta], **{name: value})
    with pytest.raises(ValueError, match="temperature"):
        make([{"params": [theta], "temperature": -1.0}])
    optimizer = make([theta])
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match="lr must be finite and positive"):
        optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.0})
    with pytest.raises(ValueError, match="holds no"):
        optimizer.load_state_dict(torch.optim.SGD([theta], lr=0.1).state_dict())
    assert optimizer.state_dict()["param_groups"] == before["param_groups"] and len(optimizer.param_groups) == 1


def test_what_dual_averaging_asks_of_its_closure():
    theta = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="inner_steps"):
        ParticleDualAveraging([theta], 0.1, temperature=1.0, inner_steps=0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        ParticleDualAveraging([theta], 0.1, temperature=0.0)
    optimizer = ParticleDualAveraging([theta], 0.1, temperature=1.0)
    with pytest.raises(TypeError, match="closure"):
        optimizer.step(None)
    with pytest.raises(TypeError, match="two tensors"):
        optimizer.step(lambda: theta.sum())
    with pytest.raises(ValueError, match="does not depend"):
        optimizer.step(lambda: (theta.sum(), theta * 2))
    with pytest.raises(ValueError, match="graph"):
        optimizer.step(lambda: (torch.zeros(()), theta * 2))
    assert not theta.any() and optimizer.outer_steps == 0

    def closure(count):
        outputs = theta[:count] * 1
        return outputs.square().sum(), outputs

    optimizer.step(lambda: closure(2))
    with pytest.raises(ValueError, match="same samples"):
        optimizer.step(lambda: closure(1))
