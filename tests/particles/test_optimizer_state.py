"""Optimizer state goes with its particle, or the motion is refused."""

import pytest
import torch
from torch import nn

from tests.particles.networks import network, neurons
from torch_meanfield import Population, Slice, Stack, transport_
from torch_meanfield.particles.optimizer_state import known_optimizers


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
    net = network()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(4, 3)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(TypeError, match="LBFGS keeps .*cannot be divided among the particles; use an optimizer"):
        transport_(neurons(net), [1, 0, 2, 3, 4])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_an_optimizer_that_shares_its_state_counts_once():
    net = network()
    inner = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    wrapper = torch.optim.SGD(net.parameters(), lr=0.1)
    wrapper.state = inner.state
    for optimizer in (inner, wrapper):
        net(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert sum(o.state is inner.state for o in known_optimizers()) == 1


class Counting(torch.optim.SGD):
    """Keeps numbers, nothing and tensors of other shapes beside the parameter's own."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["count"] = state.get("count", 0) + 1
                    state["nothing"], state["norm"] = None, p.detach().norm()


def test_numbers_and_tensors_of_any_shape_go_with_whole_particles():
    weights = [nn.Parameter(torch.full((2, 2), float(i))) for i in range(3)]
    optimizer = Counting(weights, lr=0.0, momentum=0.9)
    for first in (0, 0, 1):  # 0 steps twice, 1 once more than 2
        for p in weights[first:]:
            p.grad = torch.full((2, 2), float(first + 1))
        optimizer.step()
        optimizer.zero_grad()
    optimizer.state.pop(weights[2])
    before = [dict(optimizer.state[w]) for w in weights[:2]]
    transport_(Population([Stack(weights)]), [1, 0, 0])
    assert [optimizer.state[w]["count"] for w in weights] == [3, 2, 2]
    assert [float(optimizer.state[w]["norm"]) for w in weights] == [2.0, 0.0, 0.0]
    for w, j in zip(weights, (1, 0, 0), strict=True):
        assert optimizer.state[w].keys() == before[j].keys() and optimizer.state[w]["nothing"] is None
    pointers = [optimizer.state[w]["momentum_buffer"].data_ptr() for w in weights]
    assert len(set(pointers)) == 3  # copies part from here on
    weights[1].grad = torch.ones(2, 2)
    kept = optimizer.state[weights[2]]["momentum_buffer"].clone()
    optimizer.step()
    assert torch.equal(optimizer.state[weights[2]]["momentum_buffer"], kept)


def test_a_clone_of_a_clone_shares_no_memory():
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9)
    weights[0].grad = torch.ones(2)
    optimizer.step()
    transport_(Population([Stack(weights)]), [0, 0, 0])  # two places that had no state
    buffers = [optimizer.state[w]["momentum_buffer"] for w in weights]
    assert len({b.data_ptr() for b in buffers}) == 3 and all(torch.equal(b, torch.ones(2)) for b in buffers)


@pytest.mark.parametrize("outer, inner", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_state_and_gradients_of_slices_are_laid_out_as_their_parameter(outer, inner):
    n, index = 4, [2, 0, 0, 3]
    p = nn.Parameter(torch.zeros(3, outer * n * inner))
    optimizer = torch.optim.AdamW([p], lr=0.1, amsgrad=True)
    p.grad = torch.randn_like(p)
    optimizer.step()

    def by_unit(t):
        return t.detach().clone().unflatten(1, (outer, n, inner))[:, :, index].flatten(1)

    state = optimizer.state[p]
    expected = {k: by_unit(v) if v.shape == p.shape else v.clone() for k, v in state.items()}
    grad, weight = by_unit(p.grad), by_unit(p)
    transport_(Population([Slice(p, 1, outer, inner)]), index)
    assert torch.equal(p, weight) and torch.equal(p.grad, grad)
    assert all(torch.equal(v, expected[k]) for k, v in state.items()) and len(expected) == 4


def test_what_is_named_is_known_beside_those_that_have_stepped():
    first, second = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1) for _ in range(2))
    assert first not in known_optimizers()
    assert first in known_optimizers([first]) and second not in known_optimizers([first])
    second.param_groups[0]["params"][0].grad = torch.zeros(1)
    second.step()
    assert second in known_optimizers() and known_optimizers([second]).count(second) == 1


def test_what_cannot_be_divided_is_told_with_its_shape_or_type():
    class Odd(torch.optim.SGD):
        kept: object = None

        def step(self, closure=None):
            super().step(closure)
            self.state[self.param_groups[0]["params"][0]]["odd"] = self.kept

    for kept, told in ((torch.zeros(2, 3), r"'odd' \(shape \(2, 3\)\)"), ("a string", r"'odd' \(type str\)")):
        p = nn.Parameter(torch.zeros(4, 2))
        optimizer = Odd([p], lr=0.1)
        optimizer.kept = kept
        p.grad = torch.ones(4, 2)
        optimizer.step()
        before = p.detach().clone()
        with pytest.raises(TypeError, match=f"units: Odd keeps {told} for a parameter of shape .4, 2."):
            transport_(Population([Slice(p)], name="units"), [1, 0, 2, 3], optimizers=[optimizer])
        assert torch.equal(p, before)
