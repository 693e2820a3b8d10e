"""What was recorded around units does not outlive the motion that took them away, in memory as in a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from torch_meanfield import MeanFieldSequential
from torch_meanfield.particles import place_, transport_
from torch_meanfield.width import BirthDeathOptimizer

N, WIDTH = 4, 12


def made() -> tuple[MeanFieldSequential, BirthDeathOptimizer]:
    torch.manual_seed(0)
    branches = []
    for _ in range(N):
        branch = nn.Sequential(nn.Linear(4, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))
        with torch.no_grad():
            branch[0].bias[:3] = -50  # born anew at every event
        branches.append(branch)
    layer = MeanFieldSequential(*branches)
    declared = [[(b[0].weight, 0), (b[0].bias, 0), (b[2].weight, 1)] for b in layer]
    optimizer = BirthDeathOptimizer(
        torch.optim.SGD(layer.parameters(), lr=1e-3), layer, populations=declared, every=10, window=2.0, candidates=16
    )
    return layer, optimizer


def train(layer: nn.Module, optimizer: BirthDeathOptimizer, steps: range, at_six: Callable[[], object]) -> None:
    for step in steps:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (layer(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        if optimizer.clock == 6:
            at_six()


def crossing(layer: MeanFieldSequential, optimizer: BirthDeathOptimizer) -> None:
    layer.set_tau_([1.5, 1.0, 3.0, 4.0])


def clone(layer: MeanFieldSequential, optimizer: BirthDeathOptimizer) -> None:
    layer.resample_(torch.tensor([0, 2, 2, 3]), [optimizer])


def by_hand(layer: MeanFieldSequential, optimizer: BirthDeathOptimizer) -> None:
    transport_(optimizer.populations[1], torch.arange(WIDTH).flip(0), optimizers=[optimizer])


def placed(layer: MeanFieldSequential, optimizer: BirthDeathOptimizer) -> None:
    values = {0: torch.ones(1, 2, 1, 4)}
    place_(optimizer.populations[2], torch.tensor([5, 6]), values, optimizers=[optimizer])


@pytest.mark.parametrize("move", [crossing, clone, by_hand, placed])
@pytest.mark.parametrize("stop", [7, 8])
def test_a_run_saved_after_a_motion_goes_on_bit_for_bit(move: Callable[..., None], stop: int) -> None:
    layer, optimizer = made()
    born: list[int] = []
    optimizer.register_event_hook(lambda e: born.extend(e.born.tolist()))
    train(layer, optimizer, range(stop), lambda: move(layer, optimizer))
    saved = copy.deepcopy((layer.state_dict(), optimizer.state_dict()))
    train(layer, optimizer, range(stop, 12), lambda: None)
    assert born
    twin, second = made()
    twin.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    train(twin, second, range(stop, 12), lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), twin.parameters(), strict=True))


def test_what_is_known_of_neurons_goes_with_whoever_exchanges_them() -> None:
    layer, optimizer = made()
    train(layer, optimizer, range(4), lambda: None)
    before = {name: values.clone() for name, values in optimizer.ages().items()}
    potentials = {name: values.clone() for name, values in optimizer.potentials().items()}
    by_hand(layer, optimizer)
    placed(layer, optimizer)
    names = list(before)
    assert torch.equal(optimizer.potentials()[names[1]], potentials[names[1]].flip(0))
    assert torch.equal(optimizer.potentials()[names[0]], potentials[names[0]])
    assert optimizer.ages()[names[2]].tolist() == [4.0] * 5 + [0.0] * 2 + [4.0] * 5
