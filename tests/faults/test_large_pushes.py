"""Re-sorting is exact under every optimizer at pushes of any size, also where several particles end at tau = 0.

Against Algorithm 1 read off the page, in double precision. What was seen to depart after one large push under ASGD and
Rprop is rounding: a network with steps of 10 and more amplifies the last bit a hundredfold at each step, as the second
test shows of the reference alone.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.depth.reference import ReferenceNet
from torch_meanfield import MeanFieldSequential

OPTIMIZERS = {
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "asgd that averages": lambda p: torch.optim.ASGD(p, lr=0.05, t0=2, lambd=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.08),
    "rprop at once": lambda p: torch.optim.Rprop(p, lr=0.6),  # several particles are projected to 0: ties
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=100.0),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.05),
}


def _branch() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Tanh())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_push_of_any_size_is_exact(name: str) -> None:
    crossings = 0
    for push in (0.3, 30.0, 300.0, -300.0):
        torch.manual_seed(0)
        branches = [_branch().double() for _ in range(5)]
        layer = MeanFieldSequential(*copy.deepcopy(branches), horizon=1.0)
        reference = ReferenceNet(copy.deepcopy(branches), layer.tau_axis.anchor)
        optimizers: list[Any] = [OPTIMIZERS[name](m.parameters()) for m in (layer, reference)]
        x, y = torch.randn(2, 16, 6, dtype=torch.float64)
        for step in range(7):
            for model, optimizer in zip((layer, reference), optimizers, strict=True):
                optimizer.zero_grad()
                (model(x) - y).square().mean().backward()
            if step == 3:
                reference.offset.grad[[0, 3]] += torch.tensor([-push, push / 2], dtype=torch.float64)
                layer.tau_axis.offset.grad[reference.order.index(0)] -= push
                layer.tau_axis.offset.grad[reference.order.index(3)] += push / 2
            for optimizer in optimizers:
                optimizer.step()
            reference.sort()
            torch.testing.assert_close(layer.tau, reference.tau()[reference.order], rtol=1e-5, atol=1e-5)
            for place, i in enumerate(reference.order):
                for mine, theirs in zip(layer[place].parameters(), reference.branches[i].parameters(), strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        crossings += reference.crossings
    assert crossings


def test_after_a_large_push_the_reference_departs_from_itself_by_a_rounding_error() -> None:
    torch.manual_seed(0)
    branches = [_branch().double() for _ in range(5)]
    anchor = MeanFieldSequential(*branches, horizon=1.0).tau_axis.anchor
    one, other = (ReferenceNet(copy.deepcopy(branches), anchor) for _ in range(2))
    optimizers = [torch.optim.ASGD(m.parameters(), lr=0.05, t0=2, lambd=0.1) for m in (one, other)]
    x, y = torch.randn(2, 16, 6, dtype=torch.float64)
    apart = []
    for step in range(12):
        for model, optimizer in zip((one, other), optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            if step in (3, 7):
                model.offset.grad[[0, 3]] += torch.tensor([-300.0, 150.0], dtype=torch.float64)
            optimizer.step()
            model.sort()
        if step == 3:
            with torch.no_grad():
                other.branches[0][0].weight.mul_(1 + 2**-52)  # one bit
        apart.append(max((a - b).abs().max().item() for a, b in zip(one.parameters(), other.parameters(), strict=True)))
    assert apart[3] < 1e-15 and apart[11] > 1e-10
