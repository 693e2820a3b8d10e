"""Wide random networks, measured: many networks for the price of one.

A column of a Gaussian matrix may change its sign without changing the law of the matrix. So one matrix W for a layer
serves K networks, network k with the weights W D_k, D_k a diagonal of random signs of its own. Each is exactly a random
network of the given width, and any two share next to nothing: D_j x and D_k x are orthogonal up to 1 / sqrt(width).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Setting:
    """Which networks: h^l = W^l phi(h^{l-1}) + b^l, standard deviations ``sigma_w / sqrt(width)`` and ``sigma_b``."""

    name: str
    activation: Callable[[Tensor], Tensor]
    sigma_w: float
    sigma_b: float
    q: float
    c: float


@torch.no_grad()
def measure(
    settings: Sequence[Setting], width: int = 4096, depth: int = 30, networks: int = 32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Length and correlation of the pre-activations of two inputs in every layer, mean over networks.

    The first pre-activations are drawn with lengths and correlation as the setting says; behind them the weights are
    real.

    Returns:
        q, c: float64 ``(settings, depth + 1)``. c is the mean product over the mean length, as in the theory.
    """
    generator = torch.Generator().manual_seed(seed)
    h = torch.stack([_pairs(s, networks, width, generator) for s in settings])  # (S, K, 2, width)
    records = [_moments(h)]
    sigma_b = torch.tensor([s.sigma_b for s in settings]).view(-1, 1, 1, 1)
    sigma_w = torch.tensor([s.sigma_w for s in settings]).view(-1, 1, 1, 1)
    for _ in range(depth):
        weight = torch.randn(width, width, generator=generator)
        signs = torch.randint(0, 2, (len(settings), networks, 1, width), generator=generator) * 2 - 1
        bias = torch.randn(len(settings), networks, 1, width, generator=generator)
        x = torch.stack([s.activation(v) for s, v in zip(settings, h, strict=True)]) * signs
        h = sigma_w / width**0.5 * (x.reshape(-1, width) @ weight.T).view_as(h) + sigma_b * bias
        records.append(_moments(h))
    lengths, products = (torch.stack(t, -1) for t in zip(*records, strict=True))
    return lengths, products / lengths


def _pairs(s: Setting, networks: int, width: int, generator: torch.Generator) -> Tensor:
    a, b = torch.randn(2, networks, width, generator=generator).unbind()
    b = b - a * (a * b).mean(-1, keepdim=True) / a.square().mean(-1, keepdim=True)
    a, b = (v / v.square().mean(-1, keepdim=True).sqrt() for v in (a, b))
    return s.q**0.5 * torch.stack([a, s.c * a + (1 - s.c**2) ** 0.5 * b], 1)


def _moments(h: Tensor) -> tuple[Tensor, Tensor]:
    h = h.double()
    return h.square().mean((1, 2, 3)), (h[:, :, 0] * h[:, :, 1]).mean((1, 2))


def batch_norm_gradients(
    activation: Callable[[Tensor], Tensor], width: int, depth: int, batch: int, seed: int = 0
) -> Tensor:
    """Squared gradient norms at every layer of h = W phi(BN(h)), of a random linear loss; float64 ``(depth + 1,)``."""
    generator = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm1d(width, eps=1e-12, affine=False, track_running_stats=False)
    h = torch.randn(batch, width, generator=generator).requires_grad_()
    seen = [h]
    for _ in range(depth):
        weight = torch.randn(width, width, generator=generator) / width**0.5
        h = activation(norm(h)) @ weight.T
        h.retain_grad()
        seen.append(h)
    (h * torch.randn(batch, width, generator=generator)).sum().backward()
    return torch.stack([t.grad.double().square().sum() for t in seen if t.grad is not None])
