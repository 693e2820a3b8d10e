r"""Batch normalisation at initialisation: gradients explode, and how fast.

Layer l computes :math:`h^l = W^l \phi(\mathrm{BN}(h^{l-1}))`, batch norm over the batch alone (no epsilon, gain 1,
shift 0). The covariance of the pre-activations over the batch becomes one number a on the diagonal and one number b
off it, and from then on each layer multiplies squared gradient norms by one constant, whatever the variance of W.

Source: Yang, Pennington, Rao, Sohl-Dickstein, Schoenholz 2019 (arXiv:1902.08129), section 3. The finite-batch constant
below is derived from the same symmetry by direct integration (the paper expands in Gegenbauer polynomials).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_meanfield.theory.activation import Activation, elementwise, name_of, value_and_derivative
from torch_meanfield.theory.gaussian import expect_pair, legendre, normal_rule

# Below 4 the mean of 1 / variance over a batch is infinite.
_LEAST_BATCH = 4


def batch_norm_gradient_growth(activation: Activation, batch_size: int | None = None) -> Tensor:
    r"""What one layer with batch norm multiplies the squared norm of the gradient with, going backwards.

    For large batches normalised pre-activations are independent N(0, 1), and the factor is

    .. math:: \frac{E[\phi'(z)^2]}{\mathrm{Var}[\phi(z)]} \ge 1

    with equality for linear units only: ReLU gives :math:`\pi / (\pi - 1) \approx 1.467`. For a batch of B the
    normalised column is :math:`y = \sqrt B\,u`, u uniform on the unit sphere in the (B - 1)-dimensional space of
    centred vectors, and with :math:`D = \mathrm{diag}\,\phi'(y)`, G the centring projection and
    :math:`a - b = E[\phi(y_1)^2 - \phi(y_1)\phi(y_2)]`

    .. math:: \frac{B\; E\,\mathrm{tr}\left[(G - u u^\top) D G D\right]}{(a - b)(B - 1)(B - 3)}.

    Args:
        activation: Any element-wise callable.
        batch_size: B, at least 4 (below, the mean of the factor is infinite); ``None``: the limit of large batches.

    Returns:
        0-d float64 tensor.

    Raises:
        ValueError: A batch smaller than 4, an activation that is not element-wise or that is constant.

    Source: Yang et al. 2019, section 3.3 and eq. for the ReLU limit.

    Example:
        >>> round(batch_norm_gradient_growth(torch.relu).item(), 3)
        1.467
    """
    phi = elementwise(activation)
    if batch_size is None:
        z, w = normal_rule()
        value, slope = value_and_derivative(phi, z)
        spread = value.square() @ w - (value @ w).square()
        growth = slope.square() @ w
    else:
        n = _checked_batch(batch_size)
        spread, growth = _on_sphere(phi, n)
    if not bool(spread > 1e-12 * (1 + growth)):
        raise ValueError(f"{name_of(activation)} is constant on normalised inputs: nothing of the signal is left")
    return growth / spread


def _on_sphere(phi: Activation, n: int) -> tuple[Tensor, Tensor]:
    """a - b, and B E tr[(G - u u^T) D G D] / ((B - 1)(B - 3)), from the law of two entries of y."""

    def integrand(y1: Tensor, y2: Tensor) -> Tensor:
        (f1, d1), (f2, d2) = value_and_derivative(phi, y1), value_and_derivative(phi, y2)
        return torch.stack([f1.square(), f1 * f2, d1.square(), d1 * d2, (y1 * d1).square(), y1 * d1 * y2 * d2])

    # Entries of y have variance 1 and correlation -1 / (B - 1), as those of any centred exchangeable vector.
    one = torch.ones((), dtype=torch.float64)
    moments = expect_pair(integrand, one, one, -one / (n - 1), radial=_radius(n - 1), angles=24)
    squares, products, d2, dd, yd2, ydyd = moments
    trace = n * d2 * (1 - 2 / n) + (d2 + (n - 1) * dd) / n
    along = yd2 - (yd2 + (n - 1) * ydyd) / n  # E u^T D G D u, with u = y / sqrt(B)
    return squares - products, n * (trace - along) / ((n - 1) * (n - 3))


def _radius(dimension: int) -> tuple[Tensor, Tensor]:
    r"""The length of two orthonormal coordinates of a vector of length sqrt(d), uniform in direction, in dimension d.

    Its law is that of :math:`\sqrt{d (1 - v)}` with v of density proportional to :math:`v^{(d - 4) / 2}` on [0, 1].
    """
    if dimension == 3:  # v^(-1/2): substitute v = t^2
        t, w = legendre(64)
        return torch.sqrt(3 * (1 - t.square())), w
    # v = 1 - r^2 / d is near 1 where d is large: nodes go where the Rayleigh law would have them
    end = min(1.0, 10.0 / math.sqrt(dimension))
    s, w = legendre(96)
    s, w = s * end, w * end
    density = s * (1 - s.square()).pow((dimension - 4) / 2)
    w = w * density
    return math.sqrt(dimension) * s, w / w.sum()


def _checked_batch(batch_size: int) -> int:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"batch_size must be an integer or None (the limit of large batches), got {batch_size!r}")
    if batch_size < 2:
        raise ValueError(f"batch statistics need at least two inputs, got batch_size={batch_size}")
    if batch_size < _LEAST_BATCH:
        raise ValueError(
            f"the mean growth of gradients is infinite for batches smaller than {_LEAST_BATCH}, got "
            f"batch_size={batch_size}"
        )
    return batch_size
