r"""Tangent kernels of two-layer ReLU networks of infinite width, in closed form.

For :math:`h(x) = \sum_k a_k\,\sigma(w_k\cdot x)` with :math:`\sigma(z) = \max(z, 0)`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def outer_kernel(x: Tensor, y: Tensor | None = None) -> Tensor:
    r"""The kernel of the output weights.

    .. math:: k^{(a)}(x, y) = E_{w\sim N(0, I)}\left[\sigma(w\cdot x)\,\sigma(w\cdot y)\right]
              = \frac{|x||y|}{2\pi}\left(\sin\theta + (\pi - \theta)\cos\theta\right)

    with :math:`\theta` the angle between x and y: half the arc-cosine kernel of order 1.

    Args:
        x: ``(B, d)``.
        y: ``(B', d)``; ``None``: ``x``.

    Returns:
        ``(B, B')``, float64.

    Raises:
        TypeError, ValueError: Something else than two matrices of one width.

    Source: Yang 2022, :math:`k^{(a)}`; Cho and Saul 2009, order 1.

    Example:
        >>> outer_kernel(torch.eye(2)) * 2 * math.pi  # pi on the diagonal, 1 at a right angle
        tensor([[3.1416, 1.0000],
                [1.0000, 3.1416]], dtype=torch.float64)
    """
    theta, x, y = _angles(x, y)
    lengths = x.norm(dim=1)[:, None] * y.norm(dim=1)
    kernel: Tensor = lengths * (theta.sin() + (math.pi - theta) * theta.cos()) / (2 * math.pi)
    return kernel


def inner_kernel(x: Tensor, y: Tensor | None = None, *, output_variance: float = 1.0) -> Tensor:
    r"""The kernel of the first layer's weights.

    .. math:: k^{(w)}(x, y) = E_{a, w}\left[a^2\,\sigma'(w\cdot x)\,\sigma'(w\cdot y)\right] x\cdot y
              = E[a^2]\,\frac{\pi - \theta}{2\pi}\,x\cdot y

    Args:
        x: ``(B, d)``.
        y: ``(B', d)``; ``None``: ``x``.
        output_variance: Variance of the output weights a, at least 0.

    Returns:
        ``(B, B')``, float64.

    Raises:
        TypeError, ValueError: Something else than two matrices of one width; a negative variance.

    Source: Yang 2022, :math:`k^{(w)}`; Cho and Saul 2009, order 0.
    """
    if not (math.isfinite(output_variance) and output_variance >= 0):
        raise ValueError(f"output_variance must be finite and at least 0, got {output_variance!r}")
    theta, x, y = _angles(x, y)
    return output_variance * (math.pi - theta) / (2 * math.pi) * (x @ y.T)


def _angles(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    for name, batch in (("x", x), ("y", y)):
        if batch is None and name == "y":
            continue
        if not isinstance(batch, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(batch).__name__}")
        if batch.dim() != 2:
            raise ValueError(f"{name} must be a matrix (B, d), got shape {tuple(batch.shape)}")
    x = x.double()
    y = x if y is None else y.double()
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have the same width, got {x.shape[1]} and {y.shape[1]}")
    u, v = torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(y, dim=1)
    # An arc cosine would lose half the digits where two inputs are nearly parallel; |u - v| and |u + v| do not.
    apart = torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist")
    together = torch.cdist(u, -v, compute_mode="donot_use_mm_for_euclid_dist")
    return 2 * torch.atan2(apart, together), x, y
