"""Transport, over random populations, index maps and optimizers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.properties.strategies import SEEDS, bits, index_maps, populations, random_bits
from tests.width.optimizers import OPTIMIZERS
from torch_meanfield import Population, Slice, Stack, transport_


def moved(column: Slice | Stack, index: list[int]) -> list[Tensor]:
    """``new[i] = old[index[i]]``, entry by entry."""
    if isinstance(column, Stack):
        return [column.tensors[j].clone() for j in index]
    new = column.tensor.clone(memory_format=torch.contiguous_format)
    for o in range(column.outer):
        for i, j in enumerate(index):
            for k in range(column.inner):
                there, here = ((o * column.size + p) * column.inner + k for p in (j, i))
                new.select(column.dim, here).copy_(column.tensor.select(column.dim, there))
    return [new]


@given(st.data())
def test_any_index_map_moves_entries_as_a_loop_does_and_nothing_else(data: st.DataObject) -> None:
    drawn = data.draw(populations())
    index = data.draw(index_maps(drawn.population.size))
    expected = [t for c in drawn.population.columns for t in moved(c, index)]
    where = [(t.data_ptr(), t.stride(), t.shape, t.dtype) for t in drawn.tensors]
    motion = transport_(drawn.population, index)
    assert [bits(t) for t in drawn.tensors] == [bits(t) for t in expected]
    assert [(t.data_ptr(), t.stride(), t.shape, t.dtype) for t in drawn.tensors] == where
    assert (motion is None) == (index == list(range(len(index))))


@given(st.data())
def test_a_transport_and_its_inverse_are_the_identity_bit_for_bit(data: st.DataObject) -> None:
    drawn = data.draw(populations())
    index = torch.tensor(data.draw(st.permutations(range(drawn.population.size))))
    before = [bits(t) for t in drawn.tensors]
    transport_(drawn.population, index)
    transport_(drawn.population, index.argsort())
    assert [bits(t) for t in drawn.tensors] == before


@given(st.data())
def test_two_transports_are_the_one_of_their_product(data: st.DataObject) -> None:
    drawn = data.draw(populations())
    n = drawn.population.size
    first, second = (torch.tensor(data.draw(index_maps(n))) for _ in range(2))
    copies = Population(
        [
            Stack([t.clone() for t in c.tensors])
            if isinstance(c, Stack)
            else Slice(c.tensor.clone(), c.dim, c.outer, c.inner)
            for c in drawn.population.columns
        ]
    )
    transport_(drawn.population, first)
    transport_(drawn.population, second)
    transport_(copies, first[second])
    theirs = [t for c in copies.columns for t in (c.tensors if isinstance(c, Stack) else (c.tensor,))]
    assert [bits(t) for t in drawn.tensors] == [bits(t) for t in theirs]


@pytest.mark.parametrize("name", OPTIMIZERS)
@given(st.data())
def test_optimizer_state_and_gradients_go_where_their_particles_go(name: str, data: st.DataObject) -> None:
    n, width, steps = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
    torch.manual_seed(data.draw(SEEDS))
    into, out = nn.Parameter(torch.randn(n, width)), nn.Parameter(torch.randn(width, n).T.contiguous().T)
    optimizer = OPTIMIZERS[name]([into, out])
    for _ in range(steps):
        into.grad, out.grad = torch.randn_like(into), torch.randn_like(out)
        optimizer.step()
    tensors = {("p", 0): into, ("p", 1): out}
    for k, p in enumerate((into, out)):
        tensors.update({(key, k): v for key, v in optimizer.state[p].items() if isinstance(v, Tensor)} if steps else {})
        if p.grad is not None:
            tensors["grad", k] = p.grad
    before = {key: t.detach().clone() for key, t in tensors.items()}
    index = data.draw(index_maps(n))
    transport_(Population([Slice(into, 0), Slice(out, 1)]), index, optimizers=[optimizer])
    for (key, k), old in before.items():
        expected = old.index_select(k, torch.tensor(index)) if old.ndim == 2 else old
        assert torch.equal(tensors[key, k].detach(), expected), key


@given(st.data())
def test_a_tensor_whose_entries_share_memory_is_refused_before_anything_moves(data: st.DataObject) -> None:
    n, seed = data.draw(st.integers(2, 5)), data.draw(SEEDS)
    plain = random_bits((n, 2), torch.float32, seed)
    shared = random_bits((n, 1), torch.float32, seed).expand(n, 3)
    before = bits(plain), bits(shared)
    index = list(range(n))[::-1]
    with pytest.raises(ValueError, match="expanded: several of its entries"):
        transport_(Population([Slice(plain), Slice(shared)]), index)
    assert (bits(plain), bits(shared)) == before
