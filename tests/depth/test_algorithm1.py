"""The in-place library against the plain reference, stepped together for 200 steps with forced crossings."""

import copy

import pytest
import torch
from torch import nn

from tests.depth.reference import ReferenceNet
from torch_meanfield import MeanFieldSequential

N, CHANS, STEPS = 6, 4, 200


def _branch():
    return nn.Sequential(
        nn.BatchNorm2d(CHANS), nn.ReLU(), nn.Conv2d(CHANS, CHANS, 3, padding=1, bias=False),
        nn.BatchNorm2d(CHANS), nn.ReLU(), nn.Conv2d(CHANS, CHANS, 3, padding=1),
    )  # fmt: skip


class OpaqueBranch(nn.Module):
    """A branch whose last weight the library cannot know."""

    def __init__(self):
        super().__init__()
        self.body = _branch()
        self.gain = nn.Parameter(torch.ones(CHANS, 1, 1))

    def forward(self, x):
        return self.body(x) * self.gain


# per optimizer: how it is made, and a learning rate of tau at which a push of order 1 makes neighbours cross
OPTIMIZERS = {
    "sgd": (lambda g: torch.optim.SGD(g, lr=0.02), 0.02),
    "nesterov": (lambda g: torch.optim.SGD(g, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3), 0.003),
    "adamw": (lambda g: torch.optim.AdamW(g, lr=3e-3, foreach=False, fused=False, weight_decay=1e-2), 0.03),
    "adamw-foreach": (lambda g: torch.optim.AdamW(g, lr=3e-3, foreach=True, amsgrad=True), 0.03),
    "adamw-fused": (lambda g: torch.optim.AdamW(g, lr=3e-3, fused=True), 0.03),
    "rmsprop": (lambda g: torch.optim.RMSprop(g, lr=1e-3, momentum=0.9, centered=True), 0.003),
}


def _optimizer(name, net, offset):
    make, tau_lr = OPTIMIZERS[name]
    weights = [p for p in net.parameters() if p is not offset]
    return make([{"params": weights}, {"params": [offset], "lr": tau_lr}])


@pytest.mark.parametrize("make_branch", [_branch, OpaqueBranch], ids=["folded", "addcmul"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_agrees_with_the_reference_for_200_steps(name, make_branch):
    torch.manual_seed(0)
    layer = MeanFieldSequential(*(make_branch() for _ in range(N)), horizon=1.0).double().train()
    reference = ReferenceNet([copy.deepcopy(b) for b in layer], layer.tau_axis.anchor).double().train()
    ours = _optimizer(name, layer, layer.tau_axis.offset)
    theirs = _optimizer(name, reference, reference.offset)
    batches = torch.randn(STEPS, 3, CHANS, 5, 5, dtype=torch.float64)
    target = torch.randn(3, CHANS, 5, 5, dtype=torch.float64)
    # the push that makes the particles cross: a force on each, by identity, turned around now and then
    push = 3 * torch.randn(STEPS // 20, N, dtype=torch.float64).repeat_interleave(20, 0)

    for t in range(STEPS):
        for net, optimizer in ((layer, ours), (reference, theirs)):
            optimizer.zero_grad()
            loss = (net(batches[t]) - target).square().mean()
            loss.backward()
        layer.tau_axis.offset.grad += push[t][reference.order]
        reference.offset.grad += push[t]
        ours.step()
        theirs.step()
        reference.sort()

        order = reference.order
        assert torch.all(layer.tau.diff() >= 0) and torch.all(layer.tau >= 0)
        torch.testing.assert_close(layer.tau, reference.tau()[order], rtol=0, atol=1e-10)

    assert reference.crossings >= 20
    for place, i in enumerate(order):
        theirs_by_key = reference.branches[i].state_dict()
        for key, mine in layer[place].state_dict().items():
            torch.testing.assert_close(mine, theirs_by_key[key], rtol=0, atol=1e-10)
        for mine, yours in zip(layer[place].parameters(), reference.branches[i].parameters(), strict=True):
            _assert_same_state(ours.state[mine], theirs.state[yours], lambda v: v)
    _assert_same_state(ours.state[layer.tau_axis.offset], theirs.state[reference.offset], lambda v: v[order])


def _assert_same_state(mine, yours, pick):
    assert mine.keys() == yours.keys()
    for key, value in mine.items():
        expected = yours[key]
        if isinstance(value, torch.Tensor):
            expected = pick(expected) if expected.ndim else expected
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-10)
        else:
            assert value == expected
