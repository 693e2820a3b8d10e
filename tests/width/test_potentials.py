"""Potentials against loops over units, averages against lists of what was seen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torch_meanfield.particles import Slice
from torch_meanfield.width import Neurons
from torch_meanfield.width.turnover.potentials import Averages, potential


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


def test_averages_against_lists() -> None:
    torch.manual_seed(0)
    a, b = with_gradient(2, 5), with_gradient(3)
    averages = Averages([population_of(Slice(a, 1)), population_of(Slice(b))], window=10)
    seen: list[torch.Tensor] = []
    for step in range(40):
        a.grad, b.grad = torch.randn(2, 5), torch.randn(3)
        if step > 20:
            a.grad[:, 1] = 0
        seen.append((a * a.grad).sum(0).detach())
        averages.read()
    weights = torch.tensor([0.1 * 0.9 ** (len(seen) - 1 - t) for t in range(len(seen))])
    values = torch.stack(seen)
    torch.testing.assert_close(averages.mean(0), (weights[:, None] * values).sum(0) / weights.sum())
    expected = (weights[:, None] * values).sum(0) / (weights.sum() * (weights[:, None] * values.square()).sum(0)).sqrt()
    torch.testing.assert_close(averages.coherence(0), expected)
    assert averages.of(0)[3].tolist() == [0, 19, 0, 0, 0]
    assert averages.mature(0).all() and averages.mature(1).all()


def test_a_unit_matures_after_one_window() -> None:
    a = with_gradient(1, 3)
    averages = Averages([population_of(Slice(a, 1))], window=7)
    for _ in range(6):
        averages.read()
    assert not averages.mature(0).any()
    averages.read()
    assert averages.mature(0).all()
    averages.forget_(0, torch.tensor([1]))
    assert averages.mature(0).tolist() == [True, False, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_not_finite_leaves_no_trace(bad: float) -> None:
    a = with_gradient(2, 3)
    averages = Averages([population_of(Slice(a, 1))], window=5)
    averages.read()
    before = averages.table.clone()
    a.grad[0, 1] = bad
    averages.read()
    assert torch.equal(averages.table, before) and not averages.ok


def test_a_step_that_is_skipped_leaves_no_trace_and_scaled_gradients_are_unscaled() -> None:
    a = with_gradient(2, 3)
    population = population_of(Slice(a, 1))
    averages, plain = Averages([population], window=5), Averages([population], window=5)
    plain.read()
    a.grad.mul_(1024.0)
    averages.read(scale=torch.tensor(1024.0), found_inf=torch.tensor(0.0))
    torch.testing.assert_close(averages.table, plain.table)
    averages.read(scale=torch.tensor(1024.0), found_inf=torch.tensor(1.0))
    torch.testing.assert_close(averages.table, plain.table)


def test_a_population_without_gradients_waits_while_others_go_on() -> None:
    a, b = with_gradient(2, 3), with_gradient(2, 3)
    averages = Averages([population_of(Slice(a, 1)), population_of(Slice(b, 1))], window=5)
    b.grad = None
    averages.read()
    assert (averages.of(0)[2] > 0).all() and (averages.of(1) == 0).all()


def test_averages_move_with_their_units() -> None:
    a = with_gradient(2, 4)
    averages = Averages([population_of(Slice(a, 1))], window=5)
    averages.read()
    before, index = averages.mean(0).clone(), torch.tensor([2, 2, 0, 3])
    averages.move_(0, index)
    assert torch.equal(averages.mean(0), before[index])


def test_double_precision_is_kept() -> None:
    assert Averages([population_of(Slice(with_gradient(2, 3, dtype=torch.float64), 1))], 5).table.dtype == torch.float64
