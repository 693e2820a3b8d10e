r"""Gaussian integrals in one and two dimensions by quadrature: float64, differentiable, right for kinks at zero.

Gauss-Hermite nodes straddle the kink of a ReLU and converge slowly there. Here the line is cut at 0, into panels that
narrow towards it. In two dimensions the plane is cut, in polar coordinates, along the rays on which one of the two
correlated variables is 0, so that an activation with a kink at 0 is smooth on every sector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Panels in units of the standard deviation. They narrow towards 0 for steep activations (large q), and end where
# the density is below 1e-21.
_EDGES = (0.0, 0.01, 0.03, 0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.5, 8.0, 10.0)
_RADII = (0.0, 0.1, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.5, 8.0, 10.0)
# Correlations of +-1 are shrunk by this: there the angle is not differentiable in c, but a value so near has the
# derivative to 1e-9, while itself it moves by no more than this times the slope.
_SHRINK = 1e-12


@lru_cache(maxsize=16)
def legendre(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss and Legendre on [0, 1]; float64, shape ``(n,)`` each (Golub and Welsch 1969)."""
    k = torch.arange(1, n, dtype=torch.float64)
    off = k / torch.sqrt(4 * k.square() - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (nodes + 1) / 2, vectors[0].square()


def panels(edges: tuple[float, ...], n: int) -> tuple[Tensor, Tensor]:
    """The composite rule: n nodes in each interval between ``edges``; nodes and weights, flat."""
    x, w = legendre(n)
    left = torch.tensor(edges[:-1], dtype=torch.float64)[:, None]
    width = torch.tensor(edges, dtype=torch.float64).diff()[:, None]
    return (left + width * x).flatten(), (width * w).flatten()


@lru_cache(maxsize=1)
def normal_rule() -> tuple[Tensor, Tensor]:
    """Nodes z and weights with sum_k w_k f(z_k) = E[f(z)] for z ~ N(0, 1); float64, 300 of each."""
    half, weight = panels(_EDGES, 10)
    z = torch.cat([-half.flip(0), half])
    w = torch.cat([weight.flip(0), weight]) * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return z, w / w.sum()


@lru_cache(maxsize=1)
def rayleigh_rule() -> tuple[Tensor, Tensor]:
    """Nodes and weights for the length r of a standard normal vector in the plane, of density r exp(-r^2 / 2)."""
    r, w = panels(_RADII, 6)
    w = w * r * torch.exp(-r.square() / 2)
    return r, w / w.sum()


def broadcast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in their common shape, as views."""
    common: Any = torch.broadcast_shapes  # untyped in torch
    shape = common(*(t.shape for t in tensors))
    return [t.expand(shape) for t in tensors]


def expect(f: Callable[[Tensor], Tensor], q: Tensor) -> Tensor:
    r"""E[f(u)] for u ~ N(0, q).

    Args:
        f: Maps a tensor of any shape to that shape.
        q: Variances, at least 0; float64, any shape. The result has its shape.
    """
    z, w = (t.to(q.device) for t in normal_rule())
    return f(q.sqrt()[..., None] * z) @ w


def expect_pair(
    f: Callable[[Tensor, Tensor], Tensor],
    q1: Tensor,
    q2: Tensor,
    c: Tensor,
    radial: tuple[Tensor, Tensor] | None = None,
    angles: int = 16,
) -> Tensor:
    r"""E[f(u_1, u_2)] for centred Gaussian u of variances q_1, q_2 and correlation c.

    .. math:: u_1 = \sqrt{q_1}\, r\cos\theta, \quad u_2 = \sqrt{q_2}\, r\cos(\theta - \alpha), \quad \cos\alpha = c

    with r of density :math:`r e^{-r^2/2}`; the angle is integrated over the four sectors between the rays on which
    one of the variables is 0.

    Args:
        f: Maps two tensors of one shape to that shape, or to several such stacked in front.
        q1, q2, c: float64, broadcast against each other; the result has their common shape.
        radial: Nodes and weights for r, where the pair is not Gaussian but has another isotropic law.
        angles: Nodes in a sector.
    """
    q1, q2, c = broadcast(q1, q2, c)
    r, w = (t.to(c.device) for t in (radial or rayleigh_rule()))
    x, v = (t.to(c.device) for t in legendre(angles))
    c = c[..., None] * (1 - _SHRINK)
    alpha = torch.atan2(torch.sqrt((1 - c) * (1 + c)), c)
    rest = math.pi - alpha
    # f(-u) follows at r -> -r: two sectors of widths alpha and pi - alpha, each with its opposite
    theta = torch.cat([-math.pi / 2 + alpha * x, alpha - math.pi / 2 + rest * x], -1)
    weight = torch.cat([alpha * v, rest * v], -1) / (2 * math.pi)
    first = (q1.sqrt()[..., None] * theta.cos())[..., None]
    second = (q2.sqrt()[..., None] * (theta - alpha).cos())[..., None]
    r2, w2 = torch.cat([r, -r]), torch.cat([w, w])
    return ((f(first * r2, second * r2) @ w2) * weight).sum(-1)
