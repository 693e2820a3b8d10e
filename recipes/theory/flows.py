"""A small problem for stacks of residual blocks: to carry the plane along a swirl."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_meanfield import MeanFieldSequential


class Branch(nn.Module):
    """V tanh(W x + b) with ``hidden`` units; float64, standard normal W and b, V of variance 1 / hidden."""

    def __init__(self, dim: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.w, self.b, self.v = draw(hidden, dim), draw(hidden), draw(dim, hidden)
        with torch.no_grad():
            self.v.div_(hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w.T + self.b) @ self.v.T


def swirl(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Normal points in the plane, and where a turn by 3 exp(-|x|^2 / 2) carries them; ``(count, 2)`` each."""
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    angle = 3 * torch.exp(-x.square().sum(1) / 2)
    c, s = angle.cos(), angle.sin()
    return x, torch.stack([c * x[:, 0] - s * x[:, 1], s * x[:, 0] + c * x[:, 1]], 1)


def stack(
    n: int, hidden: int, *, horizon: float | None, seed: int, dim: int = 2, learn_tau: bool = True
) -> MeanFieldSequential:
    """n branches on a tau axis."""
    generator = torch.Generator().manual_seed(seed)
    branches = (Branch(dim, hidden, generator) for _ in range(n))
    return MeanFieldSequential(*branches, horizon=horizon, learn_tau=learn_tau)


def train_(layer: MeanFieldSequential, batch: tuple[Tensor, Tensor], steps: int, rate: float = 0.01) -> float:
    """Adam on the mean of half the squared distance; the last loss."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=rate)
    x, y = batch
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().sum() / (2 * len(x))
        loss.backward()
        optimizer.step()
    return loss.item()
