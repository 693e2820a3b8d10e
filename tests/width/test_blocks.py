"""Residual blocks as a population of the optimizer, and neurons inside blocks that move."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from torch_meanfield import (
    BirthDeathOptimizer,
    MeanFieldResNet,
    MeanFieldSequential,
    conversion_report,
    convert,
    subscribe,
)
from torch_meanfield.convert.small_network import residual_network
from torch_meanfield.width import Event, Neurons
from torch_meanfield.width.turnover.blocks import Blocks, blocks_of

N = 6


def branch(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 4))


def net(n: int = N) -> MeanFieldSequential:
    torch.manual_seed(0)
    return MeanFieldSequential(*(branch() for _ in range(n)), horizon=1.0).double()


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(32, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    (model(x) - x.flip(1)).square().mean().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        backward(model, step)
        optimizer.step()


def test_harmful_blocks_are_replaced_by_clones_of_good_ones() -> None:
    """Blocks of one sign push against the target; they die, and the horizon stays covered."""
    layer = net()
    with torch.no_grad():
        for b in layer:
            b[2].weight.copy_(0.3 * torch.eye(4, 8))
            b[2].bias.zero_()
            b[0].weight.copy_(torch.eye(8, 4).flip(1))
            b[0].bias.zero_()
        for i in (1, 4):
            layer[i][2].weight.neg_()
    optimizer = BirthDeathOptimizer(
        torch.optim.SGD(layer.parameters(), lr=1e-6), layer, populations=layer, rate=0.5, every=20
    )
    assert isinstance(optimizer.populations[0], Blocks)
    events: list[Event] = []
    optimizer.register_event_hook(events.append)
    horizon = layer.tau[-1].item()
    train(layer, optimizer, 20)
    (event,) = events
    assert set(event.index.tolist()) == {0, 2, 3, 5} and not len(event.born)
    assert all((b[2].weight.diagonal() > 0).all() for b in layer)
    assert layer.tau[-1].item() == pytest.approx(horizon, abs=1e-4) and (layer.steps() > 0).all()


def test_found_by_themselves_and_resumed_bit_for_bit() -> None:
    def make() -> tuple[nn.Module, BirthDeathOptimizer]:
        layer = net()
        inner = torch.optim.AdamW(layer.parameters(), lr=3e-3)
        example = torch.zeros(1, 4, dtype=torch.float64)
        return layer, BirthDeathOptimizer(
            inner, layer, example_input=example, rate=0.4, every=5, threshold=0.5, births="clone", batch_size=1
        )

    layer, optimizer = make()
    assert sorted(type(p).__name__ for p in optimizer.populations) == ["Blocks"] + ["Neurons"] * N
    moved: list[Event] = []
    optimizer.register_event_hook(lambda e: moved.append(e) if isinstance(e.population, Blocks) else None)
    train(layer, optimizer, 17)
    assert moved
    saved = copy.deepcopy((layer.state_dict(), optimizer.state_dict()))
    train(layer, optimizer, 23)
    twin, other = make()
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(twin, other, 23)
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), twin.state_dict().values(), strict=True))


@pytest.mark.parametrize("move", ["resort", "clone"])
def test_averaged_potentials_travel_with_the_block_their_neurons_live_in(move: str) -> None:
    layer = net(4)
    optimizer = BirthDeathOptimizer(
        torch.optim.SGD(layer.parameters(), lr=1e-9),
        layer,
        populations=[[(b[0].weight, 0), (b[0].bias, 0), (b[2].weight, 1)] for b in layer],
        every=1000,
    )
    train(layer, optimizer, 3)
    dynamics = optimizer._dynamics
    before = [dynamics.tracked[i].rows.clone() for i in range(4)]
    assert not torch.equal(before[0], before[1])
    if move == "resort":
        layer.set_tau_([0.9, 0.2, 0.5, 0.1])
        index = [3, 1, 2, 0]
    else:
        index = layer.resample_(torch.tensor([0, 2, 2, 3])).tolist()
    for place, source in enumerate(index):
        assert torch.equal(dynamics.tracked[place].rows, before[source])


def test_a_block_without_such_neurons_brings_no_past() -> None:
    layer = net(3)
    declared = [[(b[0].weight, 0), (b[0].bias, 0), (b[2].weight, 1)] for b in list(layer)[:2]]
    inner = torch.optim.SGD(layer.parameters(), lr=1e-9)
    optimizer = BirthDeathOptimizer(inner, layer, populations=declared, every=1000)
    train(layer, optimizer, 2)
    kept = optimizer._dynamics.tracked[1].rows.clone()
    layer.set_tau_([0.9, 0.2, 0.1])  # places: 2, 1, 0
    assert not optimizer._dynamics.tracked[0].rows.any()
    assert torch.equal(optimizer._dynamics.tracked[1].rows, kept)


def test_at_the_defaults_a_stage_of_a_few_blocks_loses_none() -> None:
    torch.manual_seed(0)
    model = MeanFieldResNet(depth=20, in_chans=1)
    optimizer = BirthDeathOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05), model, example_input=torch.zeros(2, 1, 8, 8), every=4
    )
    assert any(isinstance(p, Blocks) for p in optimizer.populations)
    assert any(isinstance(p, Neurons) for p in optimizer.populations)
    gone: list[Event] = []
    optimizer.register_event_hook(lambda e: gone.append(e) if isinstance(e.population, Blocks) else None)
    for step in range(8):
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert not gone


def test_what_is_no_population_is_refused() -> None:
    layer = net()
    inner = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="Linear is no layer whose blocks can die"):
        BirthDeathOptimizer(inner, layer, populations=[layer[0][0]])
    with pytest.raises(ValueError, match="a population of 1 block has nothing to exchange"):
        BirthDeathOptimizer(inner, layer, populations=MeanFieldSequential(branch()))
    with pytest.raises(ValueError, match="same layer twice"):
        BirthDeathOptimizer(inner, layer, populations=[layer, layer])
    fixed = MeanFieldSequential(branch(), branch(), learn_tau=False)
    with pytest.raises(ValueError, match="learn_tau=True"):
        BirthDeathOptimizer(torch.optim.SGD(fixed.parameters(), lr=0.1), fixed, populations=fixed)
    weights = [p for name, p in layer.named_parameters() if "tau" not in name]
    with pytest.raises(ValueError, match="not one of the optimizer's parameters"):
        BirthDeathOptimizer(torch.optim.SGD(weights, lr=0.1), layer, populations=layer)


def test_stages_of_a_converted_model_are_populations_too() -> None:
    torch.manual_seed(0)
    model = convert(residual_network(), torch.randn(2, 4))
    (stage,) = conversion_report(model)
    inner = torch.optim.SGD(model.parameters(), lr=1e-6)
    optimizer = BirthDeathOptimizer(inner, model, populations=stage.module, every=3, scheme="exact", rate=1e9)
    x = torch.randn(16, 4)
    events: list[Event] = []
    optimizer.register_event_hook(events.append)
    horizon = stage.module.tau[-1].item()
    for _ in range(3):
        model.zero_grad()
        (model(x) - x[:, :2]).square().mean().backward()
        optimizer.step()
    assert events and events[0].index.tolist() == sorted(events[0].index.tolist())
    assert stage.module.tau[-1].item() == pytest.approx(horizon, abs=1e-4) and (stage.module.steps() > 0).all()


def test_two_blocks_are_a_population_and_one_is_none() -> None:
    model = nn.Sequential(MeanFieldSequential(branch()), MeanFieldSequential(branch(), branch()), branch())
    fixed = MeanFieldSequential(branch(), branch(), learn_tau=False)
    elsewhere = net().to("meta")
    found = blocks_of(nn.Sequential(model, fixed, elsewhere, MeanFieldSequential(branch(), branch(), branch())))
    assert [(b.name, b.size) for b in found] == [("0.1 (blocks)", 2), ("3 (blocks)", 3)]
    assert [b.name for b in blocks_of(net())] == ["MeanFieldSequential (blocks)"]
    assert repr(found[0]) == "Blocks(0.1 (blocks), 2)"


def test_motions_of_blocks_tell_that_they_were_birth_and_death() -> None:
    layer = net()
    optimizer = BirthDeathOptimizer(
        torch.optim.SGD(layer.parameters(), lr=1e-6), layer, populations=layer, scheme="exact", rate=1e9, every=2
    )
    causes: list[str] = []
    with subscribe(lambda motion: causes.append(motion.cause), model=layer):
        train(layer, optimizer, 4)
    assert causes and set(causes) == {"birth_death"}
