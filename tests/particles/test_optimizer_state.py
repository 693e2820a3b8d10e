"""Optimizer state goes with its particle, or the motion is refused."""

import pytest
import torch
from torch import nn

from tests.particles.networks import network, neurons
from torch_meanfield import Population, Stack, transport_
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
