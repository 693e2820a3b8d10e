"""Slowly changing regression (Dohare et al. 2024): bits of which one flips at every task, and a network to imitate."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BITS, SLOW, HIDDEN, THRESHOLD = 20, 15, 100, 0.7  # as published


class Target:
    """One hidden layer of threshold units over bits; weights are 1 or -1, and the output has mean 0 and variance 1.

    A unit fires if at least a share :data:`THRESHOLD` of its inputs, a constant 1 among them, are as its weights ask.
    """

    def __init__(self, generator: torch.Generator) -> None:
        signs = 2.0 * torch.randint(2, (HIDDEN, BITS + 1), generator=generator) - 1
        self.weight, self.bias = signs[:, :BITS], signs[:, BITS]
        self.least = THRESHOLD * (BITS + 1) - (signs < 0).sum(1)
        self.out = 2.0 * torch.randint(2, (HIDDEN,), generator=generator) - 1
        self.mean, self.spread = 0.0, 1.0
        y = self(torch.randint(2, (20_000, BITS), generator=generator).float())
        self.mean, self.spread = float(y.mean()), float(y.std())

    def __call__(self, x: Tensor) -> Tensor:
        """Of ``x``, ``(n, BITS)`` zeros and ones; shape ``(n, 1)``."""
        fires = (x @ self.weight.T + self.bias > self.least).float()
        return ((fires @ self.out - self.mean) / self.spread)[:, None]


def walk(tasks: int, samples: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs ``(samples, BITS)`` and targets ``(samples, 1)`` of each task.

    The first :data:`SLOW` bits are alike within a task and one of them flips before the next; the others are random.
    """
    target = Target(generator)
    slow = torch.randint(2, (SLOW,), generator=generator).float()
    for _ in range(tasks):
        fast = torch.randint(2, (samples, BITS - SLOW), generator=generator).float()
        x = torch.cat([slow.expand(samples, SLOW), fast], 1)
        yield x, target(x)
        flipped = int(torch.randint(SLOW, (1,), generator=generator))
        slow = slow.clone()
        slow[flipped] = 1 - slow[flipped]
