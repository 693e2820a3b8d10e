"""Potentials against loops over units, averages against lists of what was seen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torch_meanfield.particles import Slice
from torch_meanfield.width import Neurons
from torch_meanfield.width.births.reinject import Reinject
from torch_meanfield.width.turnover.potentials import Averages, potential
from torch_meanfield.width.turnover.tracked import TrackedNeurons


def population_of(*outgoing: Slice) -> Neurons:
    n = outgoing[0].size
    return Neurons([Slice(torch.zeros(n)), *outgoing], ("in", *["out"] * len(outgoing)))


def with_gradient(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    tensor = torch.randn(*shape, dtype=dtype, requires_grad=True)
    tensor.grad = torch.randn(*shape, dtype=dtype)
    return tensor


@pytest.mark.parametrize(
    ("shape", "dim", "outer", "inner"),
    [
        ((6,), 0, 1, 1),
        ((3, 6), 1, 1, 1),
        ((6, 3), 0, 1, 1),
        ((3, 6, 2, 2), 1, 1, 1),
        ((3, 24), 1, 2, 2),
        ((24, 3), 0, 4, 1),
    ],
)
def test_potential_is_weight_times_gradient_summed_over_a_unit(
    shape: tuple[int, ...], dim: int, outer: int, inner: int
) -> None:
    torch.manual_seed(0)
    a, b = with_gradient(*shape), with_gradient(5, 6)
    out = potential(population_of(Slice(a, dim, outer, inner), Slice(b, 1)))
    assert out is not None
    for i in range(6):
        entries = [(o * 6 + i) * inner + k for o in range(outer) for k in range(inner)]
        of_unit = (a * a.grad).index_select(dim, torch.tensor(entries)).sum() + (b * b.grad)[:, i].sum()
        torch.testing.assert_close(out[i], of_unit.detach(), rtol=1e-5, atol=1e-5)


def test_half_precision_is_read_in_single() -> None:
    a = with_gradient(300, 4, dtype=torch.bfloat16)
    out = potential(population_of(Slice(a, 1)))
    assert out is not None and out.dtype == torch.float32
    torch.testing.assert_close(out, (a.detach().float() * a.grad.float()).sum(0), rtol=1e-4, atol=1e-4)


def test_without_a_gradient_there_is_no_potential() -> None:
    assert potential(population_of(Slice(nn.Parameter(torch.ones(3))))) is None


def table_of(*populations: Neurons, window: float) -> tuple[Averages, list[TrackedNeurons]]:
    units = [TrackedNeurons(p, None, Reinject()) for p in populations]
    averages = Averages([each.reader for each in units], window)
    for number, each in enumerate(units):
        each.sit_in(averages, number)
    return averages, units


@pytest.mark.parametrize("window", [1, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_averages_are_those_of_the_plain_recursion_to_the_bit_whenever_they_are_taken(
    window: int, dtype: torch.dtype
) -> None:
    """The reference averages at every step; the table may wait, here for up to a hundred steps."""
    torch.manual_seed(0)
    a, b = with_gradient(2, 5, dtype=dtype), with_gradient(3, 2, dtype=dtype)
    averages, _ = table_of(population_of(Slice(a, 1)), population_of(Slice(b, 0)), window=window)
    reference = torch.zeros(6, 8, dtype=dtype)
    for step in range(300):
        a.grad, b.grad = torch.randn(2, 5, dtype=dtype), torch.randn(3, 2, dtype=dtype)
        a.grad[:, 1] *= step % 50 < 3
        value = torch.cat([(a * a.grad).sum(0), (b * b.grad).sum(1)]).detach()
        present = torch.ones(8, dtype=torch.bool)
        if step % 13 == 4:
            b.grad, present[5:], value[5:] = None, False, 0.0
        if step % 17 == 9:
            a.grad[0, 0] = torch.inf
        else:
            new = torch.stack([value, value.square(), torch.ones_like(value)])
            averaged = reference[:3].lerp(new, 1 - (1 - 1 / window))
            counted = torch.stack([(reference[3] + 1) * (value == 0), reference[4] + 1, reference[5] + (value != 0)])
            reference = torch.where(present, torch.cat([averaged, counted]), reference)
        averages.read()
        if torch.rand(()) < 0.03:
            assert torch.equal(averages.table, reference)
    assert torch.equal(averages.table, reference)


def test_averages_against_lists() -> None:
    torch.manual_seed(0)
    a, b = with_gradient(2, 5), with_gradient(3)
    averages, units = table_of(population_of(Slice(a, 1)), population_of(Slice(b)), window=10)
    seen: list[torch.Tensor] = []
    for step in range(40):
        a.grad, b.grad = torch.randn(2, 5), torch.randn(3)
        if step > 20:
            a.grad[:, 1] = 0
        seen.append((a * a.grad).sum(0).detach())
        averages.read()
    weights = torch.tensor([0.1 * 0.9 ** (len(seen) - 1 - t) for t in range(len(seen))])
    values = torch.stack(seen)
    torch.testing.assert_close(units[0].evidence().mean, (weights[:, None] * values).sum(0) / weights.sum())
    expected = (weights[:, None] * values).sum(0) / (weights.sum() * (weights[:, None] * values.square()).sum(0)).sqrt()
    torch.testing.assert_close(units[0].evidence().coherence, expected)
    assert averages.of(0)[3].tolist() == [0, 19, 0, 0, 0]
    assert units[0].evidence().mature.all() and units[1].evidence().mature.all()


def test_a_unit_matures_after_one_window() -> None:
    a = with_gradient(1, 3)
    averages, units = table_of(population_of(Slice(a, 1)), window=7)
    for _ in range(6):
        averages.read()
    assert not units[0].evidence().mature.any()
    averages.read()
    assert units[0].evidence().mature.all()
    units[0].forget_(torch.tensor([1]))
    assert units[0].evidence().mature.tolist() == [True, False, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_not_finite_leaves_no_trace(bad: float) -> None:
    a = with_gradient(2, 3)
    averages, units = table_of(population_of(Slice(a, 1)), window=5)
    averages.read()
    before = averages.table.clone()
    a.grad[0, 1] = bad
    averages.read()
    assert torch.equal(averages.table, before) and not averages.ok


def test_a_step_that_is_skipped_leaves_no_trace_and_scaled_gradients_are_unscaled() -> None:
    a = with_gradient(2, 3)
    population = population_of(Slice(a, 1))
    (averages, _), (plain, _) = table_of(population, window=5), table_of(population, window=5)
    plain.read()
    a.grad.mul_(1024.0)
    averages.read(scale=torch.tensor(1024.0), found_inf=torch.tensor(0.0))
    torch.testing.assert_close(averages.table, plain.table)
    averages.read(scale=torch.tensor(1024.0), found_inf=torch.tensor(1.0))
    torch.testing.assert_close(averages.table, plain.table)


def test_a_population_without_gradients_waits_while_others_go_on() -> None:
    a, b = with_gradient(2, 3), with_gradient(2, 3)
    averages, units = table_of(population_of(Slice(a, 1)), population_of(Slice(b, 1)), window=5)
    b.grad = None
    averages.read()
    assert (averages.of(0)[2] > 0).all() and (averages.of(1) == 0).all()


def test_averages_move_with_their_units() -> None:
    a = with_gradient(2, 4)
    averages, units = table_of(population_of(Slice(a, 1)), window=5)
    averages.read()
    before, index = units[0].evidence().mean.clone(), torch.tensor([2, 2, 0, 3])
    units[0].move_(index)
    assert torch.equal(units[0].evidence().mean, before[index])


def test_double_precision_is_kept() -> None:
    averages, _ = table_of(population_of(Slice(with_gradient(2, 3, dtype=torch.float64), 1)), window=5)
    assert averages.table.dtype == torch.float64
