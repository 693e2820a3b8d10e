"""The one operation against ``new[i] = old[index[i]]`` written with Python lists."""

import pytest
import torch
from torch import nn

from torch_meanfield import Population, Slice, Stack, subscribe, transport_
from torch_meanfield.particles.optimizer_state import known_optimizers


def _network(n=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, n), nn.BatchNorm1d(n), nn.ReLU(), nn.Linear(n, 2))


def _neurons(net):
    columns = [Slice(net[0].weight), Slice(net[0].bias), Slice(net[3].weight, 1)]
    columns += [Slice(t) for t in (net[1].weight, net[1].bias, net[1].running_mean, net[1].running_var)]
    return Population(columns, owner=net, name="hidden")


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
    net = _network().double().eval()
    with torch.no_grad():
        net[1].running_mean.normal_(), net[1].running_var.uniform_(0.5, 2), net[1].weight.normal_()
    x = torch.randn(7, 3, dtype=torch.float64)
    before, state = net(x), {k: v.clone() for k, v in net.state_dict().items()}
    index = torch.tensor([3, 0, 4, 2, 1])
    transport_(_neurons(net), index)
    assert not torch.equal(net[0].weight, state["0.weight"])
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-13)
    transport_(_neurons(net), index.argsort())
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
        net = _network().double()
        optimizer = make(net.parameters())
        batches = torch.randn(8, 16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        losses.append([])
        for t, x in enumerate(batches):
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            if t == 3:  # between backward and step: gradients must move as well
                transport_(_neurons(net), index)
            optimizer.step()
            if t == 5:
                transport_(_neurons(net), index)
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_stacked_state_moves_whole_and_absent_state_stays_absent():
    blocks = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
    optimizer = torch.optim.Adam(blocks.parameters())
    blocks[0].weight.grad = torch.ones(2, 2)
    optimizer.step()
    blocks[0].weight.grad = torch.ones(2, 2)
    blocks[1].weight.grad = torch.ones(2, 2)
    optimizer.step()  # particle 0 has two steps behind it, particle 1 one, particle 2 none
    blocks[2].weight.requires_grad_(False)
    weights = [b.weight for b in blocks]
    storages = [optimizer.state[w]["exp_avg"].data_ptr() for w in weights[:2]]
    transport_(Population([Stack(weights)]), [1, 0, 2])
    assert [float(optimizer.state[w]["step"]) for w in weights[:2]] == [1, 2]
    assert [optimizer.state[w]["exp_avg"].data_ptr() for w in weights[:2]] == storages
    transport_(Population([Stack(weights)]), [2, 0, 1])
    assert weights[0] not in optimizer.state
    assert [float(optimizer.state[w]["step"]) for w in weights[1:]] == [1, 2]
    assert [w.requires_grad for w in weights] == [False, True, True]
    assert weights[0].grad is None and weights[2].grad is not None
    optimizer.step()  # the lazy initialisation still works on what was left without state


def test_state_that_cannot_be_divided_is_refused_before_anything_moves():
    net = _network()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(4, 3)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(TypeError, match="LBFGS keeps .*cannot be divided among the particles; use an optimizer"):
        transport_(_neurons(net), [1, 0, 2, 3, 4])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


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
    net = _network()
    with pytest.raises(ValueError, match=f"hidden: index must .*{match}"):
        transport_(_neurons(net), index)


def test_motions_are_published_to_those_who_asked():
    net, other = _network(), _network()
    seen, of_other = [], []
    with subscribe(seen.append), subscribe(of_other.append, model=nn.Sequential(other)):
        transport_(_neurons(net), [0, 1, 2, 3, 4])  # moves nothing
        transport_(_neurons(net), [1, 0, 2, 3, 4], cause="test")
        transport_(_neurons(other), [1, 0, 2, 3, 4])
    transport_(_neurons(net), [1, 0, 2, 3, 4])  # after the handles are gone
    assert [(m.population.owner is net, m.index.tolist(), m.cause) for m in seen] == [
        (True, [1, 0, 2, 3, 4], "test"),
        (False, [1, 0, 2, 3, 4], "transport"),
    ]
    assert [m.population.owner for m in of_other] == [other]
    with pytest.raises(TypeError, match="callback must be callable"):
        subscribe(3)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        subscribe(print, model=3)


def test_an_optimizer_that_shares_its_state_counts_once():
    net = _network()
    inner = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    wrapper = torch.optim.SGD(net.parameters(), lr=0.1)
    wrapper.state = inner.state
    for optimizer in (inner, wrapper):
        net(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert sum(o.state is inner.state for o in known_optimizers()) == 1
