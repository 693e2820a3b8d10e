"""Sharded tensors move as plain ones do, on a mesh of one process; tests/depth/test_sharded.py has two."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from torch_meanfield import MeanFieldSequential, Population, Slice, Stack, transport_
from torch_meanfield.particles import place_
from torch_meanfield.particles.copying import is_sharded, whole, write_
from torch_meanfield.particles.newborn_state import begin_anew_
from torch_meanfield.particles.slices import read_rows, scale_rows_, write_rows_

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed with gloo")


@pytest.fixture
def shard():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda t: distribute_tensor(t.detach().clone(), mesh, [Shard(0)])
    dist.destroy_process_group()


def _both(shard, *shape):
    torch.manual_seed(0)
    plain = torch.randn(*shape)
    sharded = shard(plain)
    assert is_sharded(sharded) and not is_sharded(plain)
    return plain, sharded


def test_slices_move_with_their_gradients_and_state(shard):
    plain, sharded = (nn.Parameter(t) for t in _both(shard, 3, 10))
    for p in (plain, sharded):
        optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
        p.grad = p.detach().clone() + 1
        optimizer.step()
        transport_(Population([Slice(p, 1, inner=2)]), [3, 0, 0, 4, 1], optimizers=[optimizer])
        p.state = optimizer.state[p]["momentum_buffer"]
    for a, b in ((plain, sharded), (plain.grad, sharded.grad), (plain.state, sharded.state)):
        assert is_sharded(b) and torch.equal(a, whole(b))


def test_stacks_move(shard):
    stacks = zip(*(_both(shard, 4, 2) for _ in range(3)), strict=True)
    plain, sharded = ([t + i for i, t in enumerate(stack)] for stack in stacks)
    transport_(Population([Stack(plain)]), [2, 0, 0])
    transport_(Population([Stack(sharded)]), [2, 0, 0])
    assert all(is_sharded(b) and torch.equal(a, whole(b)) for a, b in zip(plain, sharded, strict=True))
    assert torch.equal(plain[1], plain[2]) and not torch.equal(plain[0], plain[1])


def test_rows_are_read_scaled_and_written(shard):
    plain, sharded = _both(shard, 6, 4)
    places = torch.tensor([1, 2])
    for t in (plain, sharded):
        column = Slice(t, 0, outer=2)
        scale_rows_(column, torch.tensor([1.0, 2.0, -3.0]))
        write_rows_(column, torch.tensor([0]), 7.0)
        write_rows_(column, places, read_rows(column, places).flip(2))
    assert torch.equal(plain, whole(sharded)) and (whole(sharded)[[0, 3]] == 7).all()


def test_newborn_particles_are_placed_and_their_past_forgotten(shard):
    plain, sharded = (nn.Parameter(t) for t in _both(shard, 5, 2))
    values = torch.full((1, 2, 1, 2), 9.0)
    for p in (plain, sharded):
        optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
        p.grad = p.detach().clone() + 1
        optimizer.step()
        place_(Population([Slice(p)]), torch.tensor([4, 1]), {0: values}, optimizers=[optimizer])
        begin_anew_(Slice(p), torch.tensor([3]), [optimizer])
        p.state = optimizer.state[p]["momentum_buffer"]
    for a, b in ((plain, sharded), (plain.grad, sharded.grad), (plain.state, sharded.state)):
        assert torch.equal(a, whole(b))
    assert (whole(sharded.detach())[[1, 4]] == 9).all() and not whole(sharded.grad)[[1, 3, 4]].any()


def test_a_value_of_any_kind_is_written_in_place(shard):
    plain, sharded = _both(shard, 3, 2)
    write_(sharded, plain.double() + 1)
    assert is_sharded(sharded) and sharded.dtype == torch.float32 and torch.equal(whole(sharded), plain + 1)


def test_a_sharded_tau_is_sorted_projected_and_kept_exact(shard):
    torch.manual_seed(0)
    layer = MeanFieldSequential(*(nn.Linear(2, 2) for _ in range(4)))
    weights = [b.weight.detach().clone() for b in layer]
    layer.tau_axis.offset = nn.Parameter(shard(torch.tensor([2.5, -9.0, 0.0, 0.0])))
    assert layer.tau_axis.read().tolist() == [3.5, -7.0, 3.0, 4.0]
    layer.tau_axis.offset.grad = shard(torch.zeros(4))
    torch.optim.SGD([layer.tau_axis.offset], lr=1.0).step()
    assert layer.tau_axis.read().tolist() == [0.0, 3.0, 3.5, 4.0]
    assert is_sharded(layer.tau_axis.offset) and torch.equal(layer.tau_axis.exact_offset, whole(layer.tau_axis.offset))
    assert all(torch.equal(layer[place].weight, weights[i]) for place, i in enumerate([1, 2, 0, 3]))
