"""The one operation against ``new[i] = old[index[i]]`` written with Python lists."""

import pytest
import torch
from torch import nn

from tests.defaults import other_defaults
from tests.particles.networks import network, neurons
from torch_meanfield import Population, Slice, Stack, subscribe, transport_
from torch_meanfield.particles import place_
from torch_meanfield.particles.columns import Route
from torch_meanfield.particles.copying import PIECE, pieces


@pytest.mark.parametrize("index", [[4, 3, 2, 1, 0], [0, 0, 0, 3, 3], [1, 2, 3, 4, 0], [2, 2, 2, 2, 2]])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last"])
def test_slices_and_stacks_move_like_lists(index, layout):
    n, shape = 5, (5, 4, 3, 2)

    def laid_out(t):
        if layout == "transposed":
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        return t.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else t

    whole = laid_out(torch.randn(shape))
    packed = torch.randn(3, 30)  # dim 1: outer 2, particles 5, inner 3
    stack = [laid_out(torch.randn(shape)) for _ in range(n)]
    strides = [t.stride() for t in (whole, packed, *stack)]
    expected_whole = torch.stack([whole[j] for j in index])
    particles = [[packed[:, o * 15 + j * 3 : o * 15 + j * 3 + 3].clone() for j in range(n)] for o in range(2)]
    expected_packed = torch.cat([particles[o][j] for o in range(2) for j in index], dim=1)
    expected_stack = [stack[j].clone() for j in index]
    pointers = [t.data_ptr() for t in (whole, packed, *stack)]

    transport_(Population([Slice(whole), Slice(packed, 1, outer=2, inner=3), Stack(stack)]), index)

    assert torch.equal(whole, expected_whole) and torch.equal(packed, expected_packed)
    assert all(torch.equal(t, e) for t, e in zip(stack, expected_stack, strict=True))
    assert [t.data_ptr() for t in (whole, packed, *stack)] == pointers
    assert [t.stride() for t in (whole, packed, *stack)] == strides


def test_a_permutation_changes_nothing_in_the_function_and_its_inverse_undoes_it():
    net = network().double().eval()
    with torch.no_grad():
        net[1].running_mean.normal_(), net[1].running_var.uniform_(0.5, 2), net[1].weight.normal_()
    x = torch.randn(7, 3, dtype=torch.float64)
    before, state = net(x), {k: v.clone() for k, v in net.state_dict().items()}
    index = torch.tensor([3, 0, 4, 2, 1])
    transport_(neurons(net), index)
    assert not torch.equal(net[0].weight, state["0.weight"])
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-13)
    transport_(neurons(net), index.argsort())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.5),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    ],
)
def test_training_goes_on_as_if_nothing_had_moved(make):
    """Two runs, one with its neurons permuted half-way: the same losses, to rounding."""
    losses = []
    for index in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
        net = network().double()
        optimizer = make(net.parameters())
        batches = torch.randn(8, 16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        losses.append([])
        for t, x in enumerate(batches):
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            if t == 3:  # between backward and step: gradients must move as well
                transport_(neurons(net), index)
            optimizer.step()
            if t == 5:
                transport_(neurons(net), index)
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize(
    "index, match",
    [
        ([0, 1], "5 integers"),
        ([0, 1, 2, 3, 5], r"0..4; got values in 0..5"),
        ([0, 1, 2, 3, -1], "0..4"),
        (torch.tensor([0.0, 1, 2, 3, 4]), "float32"),
    ],
)
def test_bad_indices_are_named(index, match):
    net = network()
    with pytest.raises(ValueError, match=f"hidden: index must .*{match}"):
        transport_(neurons(net), index)


@pytest.mark.parametrize("index", [[4, 3, 2, 1, 0], [0, 0, 2, 3, 0], [1, 2, 3, 4, 0]])
def test_moving_only_the_places_that_change_is_moving_all(index):
    index = torch.tensor(index)
    places = (index != torch.arange(5)).nonzero().squeeze(1)
    whole = torch.randn(2, 30)
    part = whole.clone()
    Slice(whole, 1, outer=2, inner=3).move_(Route(index))  # as with an index that stays on its device
    Slice(part, 1, outer=2, inner=3).move_(Route(index, places))
    assert torch.equal(whole, part)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("permuted", [True, False])
def test_big_tensors_move_piece_by_piece_as_they_would_at_once(dim, permuted):
    tensor = torch.randn(64, 96, 3, 32, dtype=torch.float64).transpose(2, 3)  # 4.5 MiB, not contiguous
    n = tensor.shape[dim]
    assert len(pieces(Slice(tensor, dim).by_particle(tensor), dim + 1)) > 1
    index = torch.randperm(n) if permuted else torch.randint(n, (n,))
    expected = tensor.index_select(dim, index)
    places = (index != torch.arange(n)).nonzero().flatten()
    other = tensor.clone(memory_format=torch.preserve_format)
    Slice(tensor, dim).move_(Route(index))
    Slice(other, dim).move_(Route(index, places))
    assert torch.equal(tensor, expected)
    assert torch.equal(other, expected)


def test_defaults_of_torch_that_are_not_the_tensors_play_no_part():
    index = [3, 0, 0, 2, 4]
    for given in (index, torch.tensor(index)):
        net, stack = network(), [torch.full((2,), float(i)) for i in range(5)]
        before = net[0].weight.detach().clone()
        with other_defaults():
            transport_(neurons(net), given)
            transport_(Population([Stack(stack)]), given)
        assert torch.equal(net[0].weight, before[index]) and [int(t[0]) for t in stack] == index


@pytest.mark.parametrize("shape, dim", [((4, 200_000, 3), 0), ((200_000, 4, 3), 1), ((3, 5, 200_000), 1)])
def test_every_piece_is_small_and_together_they_are_the_tensor(shape, dim):
    tensor = torch.zeros(shape)
    parts = pieces(tensor, dim)
    assert all(part.shape[dim] == shape[dim] and part.nbytes <= PIECE for part in parts)
    assert len(parts) == -(-tensor.nbytes // PIECE)
    for part in parts:
        part.add_(1)
    assert bool((tensor == 1).all())


def test_entries_that_share_memory_cannot_be_moved_apart():
    for expanded in (torch.zeros(1).expand(2), torch.zeros(3, 1).expand(3, 2), torch.zeros(1, 4).expand(5, 4)):
        for column in (Slice(expanded), Stack([torch.zeros_like(expanded).contiguous(), expanded])):
            with pytest.raises(ValueError, match=r"units: a tensor of shape \(.*\) is expanded.*\.contiguous\(\)"):
                transport_(Population([column], name="units"), list(range(column.size))[::-1])
    single = torch.arange(3.0).expand(1, 3)  # one row: nothing is shared
    transport_(Population([Slice(single, 1)]), [2, 1, 0])
    assert single.tolist() == [[2.0, 1.0, 0.0]]


def test_values_alone_can_move():
    """As after loading a checkpoint: gradients and state stay, whatever state that is."""
    net = network()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(4, 3)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    before, grad = net[0].weight.detach().clone(), net[0].weight.grad.clone()
    with pytest.raises(TypeError, match="hidden: LBFGS keeps"):
        transport_(neurons(net), [1, 0, 2, 3, 4])
    motion = transport_(neurons(net), [1, 0, 2, 3, 4], state=False)
    assert torch.equal(net[0].weight, before[[1, 0, 2, 3, 4]]) and torch.equal(net[0].weight.grad, grad)
    assert motion.cause == "transport" and motion.index.tolist() == [1, 0, 2, 3, 4]


@pytest.mark.parametrize("outer, inner", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_newborn_particles_begin_anew_in_every_layout(outer, inner):
    n, places = 4, torch.tensor([3, 0])
    p = nn.Parameter(torch.zeros(3, outer * n * inner))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    p.grad = torch.rand_like(p) + 1
    optimizer.step()
    motions = []
    share = 0.01 * optimizer.state[p]["exp_avg_sq"].mean()
    population = Population([Slice(p, 1, outer, inner)], name="units")
    with subscribe(motions.append), other_defaults():
        place_(population, places, {0: torch.full((3, outer, 2, inner), 7.0, device="cpu")}, optimizers=[optimizer])
    state = optimizer.state[p]
    for t, newborn in ((p, 7.0), (p.grad, 0.0), (state["exp_avg"], 0.0), (state["exp_avg_sq"], share)):
        view = t.detach().unflatten(1, (outer, n, inner))
        assert (view[:, :, [0, 3]] == newborn).all() and (view[:, :, [1, 2]] != newborn).all()
    (motion,) = motions
    assert (motion.cause, motion.index.tolist(), motion.born.tolist()) == ("birth", [0, 1, 2, 3], [3, 0])
    assert list(motion.values) == [0] and motion.population is population
    with pytest.raises(TypeError, match="units: column 0 is a Stack; newborn values go to a Slice"):
        place_(Population([Stack([torch.zeros(2)] * 1)], name="units"), places[:1], {0: torch.zeros(1)})
