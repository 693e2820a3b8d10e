"""A residual network of a few lines, for the examples in docstrings."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """``x + W2 tanh(W1 x)`` on ``(B, width)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        return x + self.outer(torch.tanh(self.inner(x)))  # type: ignore[no-any-return]


class ResidualNetwork(nn.Module):
    """Residual blocks and a linear head: ``(B, width)`` to ``(B, 2)``."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks and the head."""
        return self.head(self.blocks(x))  # type: ignore[no-any-return]


def residual_network(blocks: int = 3, width: int = 4) -> ResidualNetwork:
    """Three blocks of width 4."""
    return ResidualNetwork(blocks, width)
