"""A residual MLP at T = n, where every step is one: made, trained, and asked for its loss."""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.theory.flows import stack
from torch_meanfield import MeanFieldSequential
from torch_meanfield.theory.continuum import half_squared

DIM, HIDDEN = 16, 32
Batch = tuple[Tensor, Tensor]


class Teacher:
    """Normal inputs in R^16 and what a two-layer tanh network makes of them, from a random state of its own."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.inner, self.outer = 1.5 * self._draw(DIM, 64) / DIM**0.5, self._draw(64, DIM) / 8

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def batch(self, count: int) -> Batch:
        """Fresh inputs and targets, ``(count, 16)`` each."""
        x = self._draw(count, DIM)
        return x, torch.tanh(x @ self.inner) @ self.outer


def deep_stack(n: int, seed: int) -> MeanFieldSequential:
    """n fresh branches with steps of one, small enough to train."""
    layer = stack(n, HIDDEN, horizon=None, seed=seed, dim=DIM, learn_tau=False)
    with torch.no_grad():
        for branch in layer:
            branch.w.div_(DIM**0.5)
            branch.b.mul_(0.1)
            branch.v.mul_(1.4 / n**0.5)
    return layer


def train_(layer: MeanFieldSequential, teacher: Teacher, steps: int, *, rate: float = 2e-3, size: int = 128) -> float:
    """Adam on fresh batches, the rate falling to 0 along a cosine; the last loss."""
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    value = float("nan")
    for _ in range(steps):
        x, y = teacher.batch(size)
        optimizer.zero_grad()
        loss = half_squared(layer(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        value = loss.item()
    return value


@torch.no_grad()
def loss_of(layer: MeanFieldSequential, batch: Batch) -> float:
    """Half the mean squared distance."""
    return half_squared(layer(batch[0]), batch[1]).item()
