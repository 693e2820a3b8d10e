"""Sparse gradients move with the block or unit they are of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_meanfield import MeanFieldSequential, Population, Slice, Stack, conversion_report, convert, transport_
from torch_meanfield.particles import place_

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


class _Table(nn.Module):
    """Adds, to each of its rows, the row of a table that its number names."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.table: Any = (
            nn.EmbeddingBag(4, 6, sparse=True, mode="sum") if kind == "bag" else nn.Embedding(4, 6, sparse=True)
        )
        self.out = nn.Linear(6, 6)
        self.kind = kind

    def forward(self, h: Tensor) -> Tensor:
        numbers = torch.arange(len(h)) % 3  # the last row is never read
        rows = self.table(numbers.view(-1, 1)) if self.kind == "bag" else self.table(numbers)
        return self.out(h + rows)


class _Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = _Table(kind)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.inner(h)


def _layer(kind: str) -> nn.Module:
    return MeanFieldSequential(*(_Table(kind) for _ in range(3)), horizon=1.0)


def _converted(kind: str) -> nn.Module:
    return convert(nn.Sequential(*(_Block(kind) for _ in range(3))), torch.linspace(-1, 1, 48).view(8, 6), horizon=1.0)


def _parts(model: nn.Module) -> tuple[Any, list[Any]]:
    if isinstance(model, MeanFieldSequential):
        return model, list(model)
    stage = conversion_report(model).stages[0].module
    return stage, [block.inner for (block,) in stage]


@pytest.mark.parametrize("make", [_layer, _converted])
@pytest.mark.parametrize("kind", ["embedding", "bag"])
@pytest.mark.parametrize("sparse", [torch.optim.SparseAdam, torch.optim.Adagrad, torch.optim.SGD])
def test_a_sparse_gradient_that_is_still_to_be_stepped_on_goes_with_its_block(
    sparse: Any, kind: str, make: Callable[[str], nn.Module]
) -> None:
    """The optimizer of tau steps first and re-sorts; that of the tables steps on what has moved."""
    torch.manual_seed(0)
    model = make(kind)
    stage, blocks = _parts(model)
    tables = [b.table.weight for b in blocks]
    first, second = torch.optim.SGD([stage.tau_axis.offset], lr=1e-3), sparse(tables, lr=0.1)
    reference = [t.detach().clone().requires_grad_() for t in tables]
    by_hand = sparse(reference, lr=0.1)
    order = [0, 1, 2]
    for crossing in (False, True, True):
        model.zero_grad()
        model(torch.linspace(-1, 1, 48).view(8, 6)).square().mean().backward()
        for place, particle in enumerate(order):
            reference[particle].grad = tables[place].grad.clone()
        tau = stage.tau_axis.read()
        stage.tau_axis.offset.grad.zero_()
        if crossing:
            stage.tau_axis.offset.grad[0] = -1e3 * (tau[1] - tau[0] + 1e-3)
            order[0], order[1] = order[1], order[0]
        first.step()
        assert all(t.grad.layout == torch.sparse_coo for t in tables)
        second.step()
        by_hand.step()
        for place, particle in enumerate(order):
            assert torch.equal(tables[place], reference[particle])


def test_one_gradient_sparse_and_one_absent_or_dense() -> None:
    tables = [nn.Parameter(torch.randn(4, 2)) for _ in range(3)]
    tables[0].grad = torch.eye(4)[:, :2].to_sparse()
    tables[1].grad = torch.ones(4, 2)
    before = [None if t.grad is None else t.grad.to_dense().clone() for t in tables]
    transport_(Population([Stack(tables)]), [1, 2, 0])
    assert torch.equal(tables[0].grad, before[1]) and tables[1].grad is None
    assert tables[2].grad.is_sparse and torch.equal(tables[2].grad.to_dense(), before[0])


@pytest.mark.parametrize("dim", [0, 1])
def test_slices_of_a_sparse_gradient_move(dim: int) -> None:
    """Units that own rows or columns of an embedding."""
    table = nn.Parameter(torch.randn(4, 4))
    dense = torch.diag(torch.arange(1.0, 5.0))
    table.grad = dense.to_sparse()
    population = Population([Slice(table, dim)])
    transport_(population, [2, 0, 3, 3])
    assert table.grad.is_sparse
    assert torch.equal(table.grad.to_dense(), dense.index_select(dim, torch.tensor([2, 0, 3, 3])))
    place_(population, torch.tensor([2, 3]), {0: torch.zeros(4, 1, 2, 1) if dim else torch.zeros(1, 2, 1, 4)})
    assert table.grad.is_sparse and table.grad.to_dense().count_nonzero() == 2


def test_sparse_state_moves_with_its_block_and_is_refused_for_units() -> None:
    class Lazy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for p in (p for group in self.param_groups for p in group["params"]):
                self.state[p]["sum"] = p.grad.clone()
            return super().step(closure)

    tables = [nn.Parameter(torch.randn(4, 2)) for _ in range(2)]
    optimizer = Lazy(tables, lr=0.1)
    for number, t in enumerate(tables):
        t.grad = torch.full((4, 2), float(number + 1)).to_sparse()
    optimizer.step()
    transport_(Population([Stack(tables)]), [1, 0])
    assert [optimizer.state[t]["sum"].to_dense()[0, 0].item() for t in tables] == [2.0, 1.0]
    with pytest.raises(TypeError, match="Lazy keeps 'sum'.*sparse"):
        transport_(Population([Slice(tables[0], 0)]), [1, 0, 2, 3])
