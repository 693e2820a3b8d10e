"""The continuum of a stack: against autograd, against a flow in closed form, against births; bad input."""

import copy
import math

import pytest
import torch
from torch import nn

from recipes.theory.continuum import born, loss_of
from recipes.theory.flows import Branch, stack, swirl
from torch_meanfield import MeanFieldSequential
from torch_meanfield.theory import functional_gradient, time_velocity, trajectory
from torch_meanfield.theory.continuum import half_squared

BATCH = swirl(32, 0)


def uneven(n=5, horizon=1.0):
    return stack(n, 3, horizon=horizon, seed=1).set_tau_(horizon * torch.linspace(0.1, 1, n).double() ** 1.5)


def test_of_the_blocks_that_exist_it_is_autograd():
    layer = uneven()
    where = trajectory(layer, BATCH)
    half_squared(layer(BATCH[0]), BATCH[1]).backward()
    by_step = where.by_step
    expected = by_step - torch.cat([by_step[1:], by_step.new_zeros(1)])
    torch.testing.assert_close(expected, layer.tau_axis.offset.grad, rtol=1e-10, atol=1e-14)
    tau = [0.0, *layer.tau.tolist()]
    for i, (block, step) in enumerate(zip(layer, layer.steps().tolist(), strict=True)):
        theta = copy.deepcopy(block)
        theta.zero_grad()
        value = functional_gradient(layer, BATCH, theta, (tau[i] + tau[i + 1]) / 2)
        assert value.item() == pytest.approx(by_step[i].item(), rel=1e-10)
        value.backward()
        for mine, theirs in zip(theta.parameters(), block.parameters(), strict=True):
            torch.testing.assert_close(step * mine.grad, theirs.grad, rtol=1e-10, atol=1e-14)


def test_of_a_block_that_does_not_exist_it_is_what_its_birth_does():
    layer, theta = uneven(), Branch(2, 3, torch.Generator().manual_seed(9))
    for t in (0.0, layer.tau[1].item(), layer.tau[-1].item()):
        ends = [loss_of(born(layer, theta, t, 1e-6), BATCH), loss_of(layer, BATCH)]
        assert (ends[0] - ends[1]) / 1e-6 == pytest.approx(functional_gradient(layer, BATCH, theta, t).item(), rel=1e-3)


class Turn(nn.Module):
    """x -> rate * x, turned by a quarter: the flow is a rotation."""

    def __init__(self, rate):
        super().__init__()
        self.a = nn.Parameter(rate * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64))

    def forward(self, x):
        return x @ self.a.T


def test_the_continuum_is_reached():
    """One rotation: X_t = R(t) x, p_t = R(t - T) p_T, so <p_t, X_t> = p_T . R(T) x and its gradient in t is 0."""
    layer, (x, y) = MeanFieldSequential(Turn(1.0), Turn(1.0), horizon=1.5), BATCH
    c, s = math.cos(1.5), math.sin(1.5)
    end = x @ torch.tensor([[c, -s], [s, c]], dtype=torch.float64).T
    expected = ((end - y) * end).sum().item() / len(x)
    errors = []
    for substeps in (50, 100):
        found = functional_gradient(layer, BATCH, lambda x: x, [0.0, 0.4, 1.5], substeps=substeps)
        errors.append((found - expected).abs().max().item())
    assert errors[1] < 0.03 * abs(expected)
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.05)  # Euler is of first order


def test_the_velocity_in_time_is_the_slope_of_the_functional_gradient():
    layer, theta = uneven(), Branch(2, 3, torch.Generator().manual_seed(9))
    where = trajectory(layer, BATCH, substeps=1000)
    for t in (0.3, 0.6):
        ends = where.gradient(theta, [t - 5e-3, t + 5e-3])
        slope = ((ends[1] - ends[0]) / 1e-2).item()
        assert time_velocity(where, theta, t).item() == pytest.approx(slope, rel=2e-2)


def test_at_a_node_the_velocity_is_the_mean_of_both_sides():
    layer, theta = uneven(), Branch(2, 3, torch.Generator().manual_seed(9))
    where, node = trajectory(layer, BATCH, substeps=250), layer.tau[1].item()
    sides = time_velocity(where, theta, [node - 1e-3, node, node + 1e-3])
    assert sides[1].item() == pytest.approx((sides[0] + sides[2]).item() / 2, rel=2e-2)
    assert sides[0].item() != pytest.approx(sides[2].item(), rel=0.05)


def test_the_stack_and_the_process_stay_as_they_were():
    torch.manual_seed(0)
    layer = MeanFieldSequential(*(nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(), nn.Linear(2, 2)) for _ in range(3)))
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    batch = tuple(b.float() for b in BATCH)
    one, two = trajectory(layer, batch), trajectory(layer, batch)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(one.adjoints, two.adjoints)
    assert all(p.grad is None for p in layer.parameters()) and not batch[0].requires_grad
    with torch.no_grad():
        assert functional_gradient(layer, batch, layer[0], 1.0).ndim == 0


def test_a_block_that_reads_nothing_has_no_slope_of_its_own():
    """Constant blocks carry X along a line, p stays, and a constant candidate has one gradient at all times."""

    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones_like(x)

    where = trajectory(MeanFieldSequential(Constant(), Constant(), horizon=1.0), BATCH)
    torch.testing.assert_close(where.states[2], BATCH[0] + 1)
    assert torch.equal(where.adjoints[0], where.adjoints[2])
    assert time_velocity(where, torch.ones_like, 0.3).item() == 0
    slope = time_velocity(where, lambda x: x, 0.3).item()  # d/dt <p, X> = <p, 1>
    assert slope == pytest.approx(where.adjoints[0].sum().item())


def test_blocks_out_of_order_are_run_in_order():
    layer = uneven()
    layer.auto_resort = False
    with torch.no_grad():
        layer.tau_axis.offset[0] = 2.0
    assert trajectory(layer, BATCH).loss == pytest.approx(loss_of(layer, BATCH), rel=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: trajectory(nn.Linear(2, 2), BATCH), TypeError, "must be a MeanFieldSequential, got Linear"),
        (lambda: trajectory(uneven(), BATCH[0]), TypeError, "a pair"),
        (lambda: trajectory(uneven(), BATCH, substeps=0), ValueError, "substeps"),
        (lambda: trajectory(uneven(), (BATCH[0], BATCH[1][:, :1])), ValueError, "pass loss="),
        (lambda: trajectory(uneven(), BATCH, loss=lambda a, b: a), ValueError, "scalar"),
        (lambda: trajectory(uneven(), BATCH, loss=lambda a, b: b.sum()), ValueError, "depends on the output"),
        (lambda: trajectory(uneven(), BATCH, max_bytes=1000), ValueError, "a batch of 5 fits"),
        (lambda: functional_gradient(uneven(), BATCH, torch.tanh, 1.1), ValueError, "t must lie in .0, 1."),
        (lambda: functional_gradient(uneven(), BATCH, lambda x: x[:, :1], 0.5), ValueError, "keep the shape"),
        (
            lambda: trajectory(MeanFieldSequential(nn.Linear(2, 2), solver=lambda x, f, h: x + h * f(x)), BATCH),
            ValueError,
            "Euler steps",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
