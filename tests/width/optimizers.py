"""The optimizers every expectation is tested over, and a small network to train."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torch_meanfield.width import BirthDeathOptimizer

Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = lambda p: torch.optim.Muon(p, lr=1e-2)


class Net(nn.Module):
    """Two layers of matrices (Muon takes nothing else); some units are dead from the start."""

    def __init__(self, seed: int = 0, units: int = 24) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(6, units, bias=False)
        self.last = nn.Linear(units, 3, bias=False)
        with torch.no_grad():
            self.first.weight[:4] = -self.first.weight[:4].abs()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))

    def slices(self) -> list[tuple[Tensor, int]]:
        return [(self.first.weight, 0), (self.last.weight, 1)]


def wrap(model: Net, optimizer: torch.optim.Optimizer, **kwargs: Any) -> BirthDeathOptimizer:
    """With events often enough for a test, and any harm enough to be replaced (as if a sample had no noise)."""
    return BirthDeathOptimizer(
        optimizer, model, populations=model.slices(), **{"every": 10, "candidates": 32, "batch_size": 1, **kwargs}
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    x = torch.rand(32, 6, generator=g)  # not negative: units with negative weights are dead
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3:].sum(1)], 1)


def backward(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *after: Any) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        for a in after:
            a.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
