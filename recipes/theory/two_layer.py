"""Two-layer networks that several recipes train."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TwoLayer(nn.Module):
    """h(x) = scale * sum_k a_k relu(w_k . x), a ~ N(0, gamma^2), w ~ N(0, I); float64. Outputs ``(B,)``."""

    def __init__(self, d: int, width: int, *, scale: float, gamma: float, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = nn.Linear(d, width, bias=False, dtype=torch.float64)
        self.outer = nn.Linear(width, 1, bias=False, dtype=torch.float64)
        self.scale = scale
        with torch.no_grad():
            self.inner.weight.normal_(generator=generator)
            self.outer.weight.normal_(generator=generator).mul_(gamma)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.outer(torch.relu(self.inner(x))).squeeze(1)


def descend_(model: nn.Module, x: Tensor, y: Tensor, learning_rate: float, steps: int) -> list[float]:
    """Full-batch gradient descent on (1/2n) sum |h - y|^2; the loss before each step and after the last."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    losses = []
    for step in range(steps + 1):
        loss = (model(x) - y).square().sum() / (2 * len(x))
        losses.append(loss.item())
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses
