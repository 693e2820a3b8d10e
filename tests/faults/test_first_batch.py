"""The samples of the first step count, though the layer that counts them is known only after it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_meanfield import BirthDeathOptimizer

BATCH = 8


class _Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


class _Patches(nn.Module):
    """Sees each sample in four pieces, as windows and patches are seen."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.repeat_interleave(4, 0)).view(-1, 4, 2).mean(1)


class _Named(nn.Module):
    """Takes two arguments, the first of which is no tensor of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _Plain()

    def forward(self, scale: float, x: Tensor) -> Tensor:
        return self.net(x * scale)


def _wrapped(net: nn.Module, example: Any = None, every: int = 8) -> BirthDeathOptimizer:
    return BirthDeathOptimizer(torch.optim.SGD(net.parameters(), lr=0.01), net, every=every, example_input=example)


def _counted(optimizer: BirthDeathOptimizer) -> list[int]:
    return optimizer.state_dict()["birth_death"]["batch"]


def _loss(net: nn.Module, rows: int = BATCH) -> Tensor:
    x = torch.randn(rows, 4)
    return (net(1.0, x) if isinstance(net, _Named) else net(x)).square().mean()


def _plainly(net: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    _loss(net).backward()
    optimizer.step()


def _zeroed_late(net: nn.Module, optimizer: Any) -> None:
    loss = _loss(net)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _accumulating(net: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    for rows in (BATCH, 3):
        _loss(net, rows).backward()
    optimizer.step()


def _skipping(net: nn.Module, optimizer: Any) -> None:
    """A scaler has skipped the first step: its gradients are thrown away."""
    for _ in range(2):
        optimizer.zero_grad()
        _loss(net).backward()
    optimizer.step()


def _skipping_by_the_model(net: nn.Module, optimizer: Any) -> None:
    for _ in range(2):
        net.zero_grad()
        _loss(net).backward()
    optimizer.step()


def _evaluating(net: nn.Module, optimizer: Any) -> None:
    with torch.no_grad():
        _loss(net)
    _plainly(net, optimizer)


def _two_passes(net: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    (_loss(net) + _loss(net, 5)).backward()
    optimizer.step()


@pytest.mark.parametrize("make", [_Plain, _Patches, _Named])
@pytest.mark.parametrize(
    "step",
    [_plainly, _zeroed_late, _accumulating, _skipping, _skipping_by_the_model, _evaluating, _two_passes],
)
def test_the_first_step_counts_what_it_counts_with_an_example(make: Any, step: Any) -> None:
    torch.manual_seed(0)
    net = make()
    twin = copy.deepcopy(net)
    example = (1.0, torch.randn(2, 4)) if make is _Named else torch.randn(2, 4)
    ours, known = _wrapped(net), _wrapped(twin, example)
    for number in range(1, 5):
        step(net, ours)
        step(twin, known)
        assert _counted(ours) == _counted(known)
        assert _counted(ours)[:2] == [number * _counted(known)[0] // number, number] and _counted(ours)[0] > 0


def test_32_samples_are_counted_after_4_steps_of_8() -> None:
    net = _Plain()
    optimizer = _wrapped(net)
    for _ in range(4):
        _plainly(net, optimizer)
    assert _counted(optimizer) == [32, 4, 1]


@pytest.mark.parametrize("at", [1, 3, 7, 8])
def test_the_first_step_after_a_resume_counts_too(at: int) -> None:
    torch.manual_seed(0)
    net = _Plain()
    optimizer = _wrapped(net)
    for _ in range(at):
        _plainly(net, optimizer)
    again = copy.deepcopy(net)
    resumed = _wrapped(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        _plainly(net, optimizer)
        _plainly(again, resumed)
        assert _counted(resumed) == _counted(optimizer)


def test_nothing_stays_in_the_model() -> None:
    net = _Plain()
    optimizer = _wrapped(net, every=1000)
    parameter = next(net.parameters())
    assert parameter._post_accumulate_grad_hooks  # type: ignore[attr-defined]
    _plainly(net, optimizer)
    assert not parameter._post_accumulate_grad_hooks and not net._forward_pre_hooks  # type: ignore[attr-defined]
    assert _counted(optimizer)[0] == 0  # an event is far off: nothing is counted yet
