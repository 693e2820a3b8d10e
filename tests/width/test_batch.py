"""The number of samples in a step is counted where it can be, and its absence is said."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from tests.width.optimizers import Net, batch, train
from torch_meanfield.particles import Slice
from torch_meanfield.width import BirthDeathOptimizer, Neurons
from torch_meanfield.width.turnover import batch_size


def test_counted_at_a_layer_of_the_model_only_before_an_event() -> None:
    model = Net()
    optimizer = BirthDeathOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-3), model, populations=model.slices(), every=50
    )
    train(model, optimizer, range(5))
    assert not model.last._forward_hooks
    train(model, optimizer, range(5, 49))
    assert optimizer._dynamics.batch.size() == 32.0
    model.eval()
    with torch.no_grad():
        model(torch.rand(1000, 6))  # an evaluation in between is not a step
    assert optimizer._dynamics.batch.size() == 32.0
    train(model, optimizer, range(49, 50))
    assert not model.last._forward_hooks


def test_accumulated_gradients_count_together() -> None:
    model = Net()
    inner = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = BirthDeathOptimizer(inner, model, populations=model.slices(), every=20)
    for _ in range(19):
        for _ in range(3):
            model(torch.rand(8, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer._dynamics.batch.size() == 24.0


@pytest.mark.parametrize("zeroed", ["before the forward pass", "between forward and backward pass"])
@pytest.mark.parametrize("skipped", [(), (2, 5, 6)])
def test_steps_that_were_taken_count_wherever_gradients_are_zeroed(zeroed: str, skipped: tuple[int, ...]) -> None:
    """Lightning, and many a loop, zeroes the last step's gradients when the next forward pass has been made."""
    model = Net()
    inner = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = BirthDeathOptimizer(inner, model, populations=model.slices(), every=20)
    for step in range(19):
        if zeroed.startswith("before"):
            optimizer.zero_grad()
        loss = model(torch.rand(8 if step not in skipped else 100, 6)).square().mean()
        if zeroed.startswith("between"):
            optimizer.zero_grad()
        loss.backward()
        if step not in skipped:
            optimizer.step()
    assert optimizer._dynamics.batch.size() == 8.0


def test_unknown_without_a_model_and_said_once() -> None:
    model = Net()
    optimizer = BirthDeathOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05), populations=model.slices(), every=10, threshold=0.1, steep=False
    )
    with torch.no_grad():
        reached = torch.stack([(model.first(batch(step)[0]) > 0).any(0) for step in range(10)]).any(0)
    replaced: list[int] = []
    optimizer.register_event_hook(lambda event: replaced.extend(event.born.tolist()))
    with pytest.warns(RuntimeWarning, match="pass batch_size="):
        train(model, optimizer, range(10))
    assert replaced and not reached[replaced].any()  # those that were dead from the start
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(10, 20))


def test_nothing_is_said_of_populations_that_are_frozen() -> None:
    model = Net()
    inner = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = BirthDeathOptimizer(inner, model, populations=model.slices(), every=5)
    model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            model(torch.rand(8, 6))
            optimizer.step()
    assert optimizer.clock == 5


def test_the_count_survives_a_checkpoint_a_copy_and_a_pickle() -> None:
    def make() -> tuple[Net, BirthDeathOptimizer]:
        model = Net()
        inner = torch.optim.SGD(model.parameters(), lr=1e-3)
        return model, BirthDeathOptimizer(inner, model, populations=model.slices(), every=60)

    model, optimizer = make()
    train(model, optimizer, range(30))  # the last 40 steps before the event are watched
    twin, other = make()
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert other._dynamics.batch.state() == optimizer._dynamics.batch.state() != [0, 0, 0]
    train(twin, other, range(30, 40))
    assert other._dynamics.batch.size() == 32.0
    for both in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        train(*both, range(30, 40))
        assert both[1]._dynamics.batch.size() == 32.0


def test_newborn_units_get_the_statistics_of_what_they_will_see() -> None:
    """Without them, a unit born into a batch norm is wrong in evaluation for tens of steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 2, 3, padding=1))
    with torch.no_grad():
        net[0].weight.mul_(5).sub_(0.3)
        net[0].bias[:3] -= 1000
        net[1].bias[:3] = -10  # three units that no image reaches
    population = Neurons(
        [Slice(t, 0) for t in (net[0].weight, net[0].bias)]
        + [Slice(t, 0) for t in (net[1].weight, net[1].bias, net[1].running_mean, net[1].running_var)]
        + [Slice(net[3].weight, 1)],
        ("in", "in", "own", "own", "own", "own", "out"),
        owner=net,
        name="hidden",
    )
    optimizer = BirthDeathOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.0 + 1e-9), net, populations=population, every=20, rate=0.01
    )
    born: list[list[int]] = []
    optimizer.register_event_hook(lambda event: born.append(event.born.tolist()))
    x = torch.rand(64, 2, 6, 6) + 2
    for _ in range(20):
        optimizer.zero_grad()
        (net(x) - x).square().mean().backward()
        optimizer.step()
    assert born == [[0, 1, 2]]
    with torch.no_grad():
        h = net[0](x).transpose(0, 1).flatten(1)[:3]
    # the rows are a sample: a few images of each step
    torch.testing.assert_close(net[1].running_mean[:3], h.mean(1), rtol=0.05, atol=0.05)
    torch.testing.assert_close(net[1].running_var[:3], h.var(1), rtol=0.2, atol=0.0)


def test_one_count_of_samples_serves_for_a_hundred_steps_of_plastic(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    optimizer = BirthDeathOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model, scheme="plastic")
    asked: list[int] = []
    monkeypatch.setattr(batch_size, "of_all_ranks", lambda mine: asked.append(optimizer.clock) or [mine, mine])
    train(model, optimizer, range(210))
    assert asked == [5, 100, 200] and optimizer._dynamics.events.batch_size == 64
    assert not model.first._forward_hooks and not model.last._forward_hooks


def test_a_rank_that_does_not_know_its_samples_has_all_count_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    optimizer = BirthDeathOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model, scheme="plastic")
    asked: list[int] = []
    other = iter([None, 32.0, 32.0])
    monkeypatch.setattr(batch_size, "of_all_ranks", lambda mine: asked.append(optimizer.clock) or [mine, next(other)])
    with pytest.warns(RuntimeWarning, match="how many samples"):
        train(model, optimizer, range(60))
    assert asked == [5, 10] and optimizer._dynamics.events.batch_size == 64
