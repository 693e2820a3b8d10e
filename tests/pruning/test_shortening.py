"""A shorter index: what moves, what is cut, what optimizers forget, and that a failure leaves nothing behind."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from torch_meanfield import MeanFieldSequential, Population, Slice, Stack, follow, subscribe
from torch_meanfield.depth.shortening import keep_, positions_without
from torch_meanfield.particles.shortening import forget_, shorten_


def stack(n: int = 5, width: int = 3) -> MeanFieldSequential:
    torch.manual_seed(0)
    return MeanFieldSequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(n)))


def trained(layer: nn.Module, kind=torch.optim.AdamW, **options) -> torch.optim.Optimizer:
    optimizer = kind(layer.parameters(), lr=1e-3, **options)
    for _ in range(3):
        layer(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
    return optimizer


def everything(layer: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    found = [t.clone() for t in layer.state_dict().values()]
    found += [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    for group in optimizer.param_groups:
        for p in group["params"]:
            found += [v.clone() for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    return found


def test_whole_tensors_and_slices_take_a_shorter_index_with_gradients_and_state():
    rows, table = [nn.Parameter(torch.full((2,), float(i))) for i in range(4)], nn.Parameter(torch.arange(8.0))
    optimizer = torch.optim.SGD([*rows, table], lr=0.0, momentum=0.9)
    for i, p in enumerate(rows):
        p.grad = torch.full_like(p, 10.0 + i)
    table.grad = 100 + torch.arange(8.0)
    optimizer.step()
    population = Population([Stack(rows), Slice(table, inner=2)])
    seen = []
    with subscribe(seen.append), ExitStack() as undo:
        gone = shorten_(population, [1, 3], optimizers=[optimizer], undo=undo)
        forget_(optimizer, gone, undo)
        undo.pop_all()
    assert [r[0].item() for r in rows[:2]] == [1.0, 3.0]
    assert [r.grad[0].item() for r in rows[:2]] == [11.0, 13.0]
    assert [optimizer.state[r]["momentum_buffer"][0].item() for r in rows[:2]] == [11.0, 13.0]
    assert table.tolist() == [2.0, 3.0, 6.0, 7.0] and table.grad.tolist() == [102.0, 103.0, 106.0, 107.0]
    assert optimizer.state[table]["momentum_buffer"].tolist() == [102.0, 103.0, 106.0, 107.0]
    assert {id(t) for t in gone} == {id(t) for t in rows[2:]}
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(rows[0]), id(rows[1]), id(table)]
    assert len(optimizer.state) == 3 and [m.index.tolist() for m in seen] == [[1, 3, 0, 2]]


def test_a_slice_with_outer_and_inner_parts_is_cut_along_its_dimension():
    table = torch.arange(24.0).view(2, 12)
    with ExitStack() as undo:
        shorten_(Population([Slice(table, 1, outer=2, inner=2)]), [2, 0], undo=undo)
        undo.pop_all()
    assert table.tolist() == [[4, 5, 0, 1, 10, 11, 6, 7], [16, 17, 12, 13, 22, 23, 18, 19]]


@pytest.mark.parametrize("index", [[0, 0], [0, 5], [-1], [True], [0.0]])
def test_a_wrong_index_is_refused_before_anything_moves(index):
    layer = stack()
    before = copy.deepcopy(layer.state_dict())
    with ExitStack() as undo, pytest.raises(ValueError, match="index must hold different integers"):
        shorten_(layer.population(), index, undo=undo)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_what_is_undone_is_as_it_was(kind):
    layer = stack()
    optimizer = trained(layer, kind, **({"momentum": 0.9} if kind is torch.optim.SGD else {"fused": True}))
    kept_average = [p.detach().clone() for p in layer.parameters()]
    follow(kept_average, layer)
    averaged = torch.optim.swa_utils.AveragedModel(layer)
    before, of_lists = everything(layer, optimizer), [t.clone() for t in kept_average]
    of_average = copy.deepcopy(averaged.state_dict())
    parameters = [id(p) for p in layer.parameters()]
    x = torch.randn(4, 3)
    y = layer(x)
    with ExitStack() as undo:
        gone = keep_(layer, [1, 3], [optimizer], undo=undo)
        forget_(optimizer, gone, undo)
        assert len(layer) == 2 and len(kept_average) == 5 and len(averaged.module) == 2
    assert len(layer) == 5 and [id(p) for p in layer.parameters()] == parameters
    assert all(map(torch.equal, everything(layer, optimizer), before)) and torch.equal(layer(x), y)
    assert all(map(torch.equal, kept_average, of_lists))
    assert all(torch.equal(v, of_average[k]) for k, v in averaged.state_dict().items())
    optimizer.step()


def test_the_step_of_a_block_that_goes_is_gone_and_no_other_changes():
    layer = stack().double()
    layer.set_tau_([0.5, 2.0, 2.25, 4.0, 4.125])
    x = torch.randn(4, 3, dtype=torch.float64)
    steps = layer.steps().tolist()
    reference = copy.deepcopy(layer)
    reference.set_tau_([0.0, 1.5, 1.5, 3.25, 3.375])  # blocks 0 and 2 at step 0
    with ExitStack() as undo:
        keep_(layer, [1, 3, 4], undo=undo)
        undo.pop_all()
    assert layer.steps().tolist() == [steps[i] for i in (1, 3, 4)]
    assert torch.equal(layer(x), reference(x)) and layer.horizon == 3.0
    assert [name for name, _ in layer.named_children()] == ["0", "1", "2", "tau_axis"]


def test_what_was_learned_of_a_time_stays_apart_from_where_it_was_put():
    layer = stack(3)
    with torch.no_grad():
        layer.tau_axis.offset.copy_(torch.tensor([0.25, -0.25, 0.5]))
    offset = layer.tau_axis.offset
    with ExitStack() as undo:
        keep_(layer, [0, 2], undo=undo)
        undo.pop_all()
    assert layer.tau_axis.offset is offset and offset.tolist() == [0.25, 0.5]
    assert layer.tau_axis.anchor.tolist() == [1.0, 2.5] and layer.steps().tolist() == [1.25, 1.75]


def test_a_layer_of_fixed_unit_steps_still_multiplies_by_nothing():
    torch.manual_seed(0)
    layer = MeanFieldSequential(*(nn.Linear(3, 3) for _ in range(4)), learn_tau=False)
    x = torch.randn(2, 3)
    expected = x + layer[1](x)
    expected = expected + layer[2](expected)
    with ExitStack() as undo:
        keep_(layer, [1, 2], undo=undo)
        undo.pop_all()
    assert layer.tau_axis.has_unit_steps() and torch.equal(layer(x), expected)


def test_positions_of_an_average_may_cross():
    tau = torch.tensor([1.0, 0.25, 3.0])  # in time: 1, 0, 2
    assert positions_without(tau, [0, 2]).tolist() == [0.75, 2.75]
    assert positions_without(tau, [1, 2]).tolist() == [0.25, 2.25]
    assert positions_without(tau, [0, 1, 2]).tolist() == tau.tolist()


def test_a_block_that_an_optimizer_does_not_reach_stays_where_it_is():
    layer = stack(3)
    some = torch.optim.SGD([*layer[2].parameters(), layer.tau_axis.offset], lr=0.1)
    with ExitStack() as undo, pytest.raises(ValueError, match="does not hold"):
        keep_(layer, [0, 2], [some], undo=undo)
    assert len(layer) == 3 and layer.tau.tolist() == [1.0, 2.0, 3.0]
