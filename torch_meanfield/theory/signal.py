r"""Signal propagation in wide fully connected networks: how lengths and correlations travel from layer to layer.

Layer l computes :math:`h^l = W^l \phi(h^{l-1}) + b^l` with independent :math:`W_{ij} \sim N(0, \sigma_w^2 / n)` and
:math:`b_i \sim N(0, \sigma_b^2)`. In the limit of large width n the numbers :math:`h_i^l` of one input are Gaussian of
variance :math:`q^l`, and those of two inputs have correlation :math:`c^l`; both follow deterministic maps.

Source: Poole et al. 2016 (arXiv:1606.05340), eqs. (3) and (5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_meanfield.theory.activation import Activation, elementwise
from torch_meanfield.theory.gaussian import broadcast, expect, expect_pair

Number = float | Tensor


@dataclass(frozen=True, eq=False)
class Propagation:
    """Predicted lengths and correlations, layer by layer.

    Attributes:
        q: float64 ``(depth + 1, ...)``: variance of the pre-activations, from the given one on.
        c: float64, of the same shape: correlation of the pre-activations of two inputs.
    """

    q: Tensor
    c: Tensor


def length_map(activation: Activation, q: Number, sigma_w: Number, sigma_b: Number = 0.0) -> Tensor:
    r"""One layer's effect on the variance of pre-activations.

    .. math:: \mathcal V(q) = \sigma_w^2\, E\left[\phi(\sqrt q\, z)^2\right] + \sigma_b^2

    Args:
        activation: Any element-wise callable.
        q: Variances, at least 0.
        sigma_w, sigma_b: Standard deviations, at least 0; all broadcast against each other.

    Returns:
        float64, of the common shape; differentiable in ``q``, ``sigma_w`` and ``sigma_b``.

    Raises:
        ValueError: A negative variance or deviation, or an activation that is not element-wise.
        TypeError: An activation that is no callable on float64 tensors.

    Source: Poole et al. 2016, eq. (3).

    Example:
        >>> round(length_map(torch.relu, 3.0, sigma_w=2**0.5).item(), 6)
        3.0
    """
    phi = elementwise(activation)
    q, sigma_w, sigma_b = checked(q=q, sigma_w=sigma_w, sigma_b=sigma_b)
    return sigma_w.square() * second_moment(phi, q) + sigma_b.square()


def correlation_map(
    activation: Activation, c: Number, sigma_w: Number, sigma_b: Number = 0.0, *, q: Number, q2: Number | None = None
) -> Tensor:
    r"""One layer's effect on the correlation of the pre-activations of two inputs.

    .. math::
        \mathcal C(c) = \frac{\sigma_w^2\, E[\phi(u_1)\phi(u_2)] + \sigma_b^2}{\sqrt{\mathcal V(q_1)\mathcal V(q_2)}}

    with :math:`u` centred Gaussian of variances :math:`q_1, q_2` and correlation c. At the fixed point of the length
    map the denominator is :math:`q^*`.

    Args:
        activation: Any element-wise callable.
        c: Correlations in [-1, 1].
        sigma_w, sigma_b: Standard deviations.
        q: Variance of the first input's pre-activations, and of the second's unless ``q2`` gives that.
        q2: Variance of the second input's.

    Returns:
        float64, of the common shape, differentiable; 0 / 0 (no length at all) is ``nan``.

    Raises:
        ValueError: As :func:`length_map`, or a correlation outside [-1, 1].

    Source: Poole et al. 2016, eq. (5).

    Example:
        >>> round(correlation_map(torch.relu, 0.0, 2**0.5, q=1.0).item(), 6)  # 1 / pi
        0.31831
    """
    phi = elementwise(activation)
    q1, other, sigma_w, sigma_b = checked(q=q, q2=q if q2 is None else q2, sigma_w=sigma_w, sigma_b=sigma_b)
    rho = checked_correlation(c)
    product = sigma_w.square() * cross_moment(phi, q1, other, rho) + sigma_b.square()
    lengths = [sigma_w.square() * second_moment(phi, v) + sigma_b.square() for v in (q1, other)]
    return product / (lengths[0] * lengths[1]).sqrt()


def propagate(
    activation: Activation,
    depth: int,
    sigma_w: Number,
    sigma_b: Number = 0.0,
    *,
    q: Number = 1.0,
    c: Number = 0.0,
) -> Propagation:
    """Lengths and correlations of two inputs of equal length through ``depth`` layers.

    Args:
        activation: Any element-wise callable.
        depth: Number of applications of the maps, at least 0.
        sigma_w, sigma_b: Standard deviations.
        q: Variance of the first pre-activations. For inputs x of size d behind a first layer of the same law it is
            ``sigma_w**2 * x.square().mean() + sigma_b**2``.
        c: Correlation of the first pre-activations.

    Raises:
        ValueError: As :func:`correlation_map`, or a negative depth.

    Source: Poole et al. 2016, eqs. (3) and (5), iterated.

    Example:
        >>> propagate(torch.tanh, 30, sigma_w=1.5, q=2.0, c=0.5).q.shape
        torch.Size([31])
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
        raise ValueError(f"depth must be an integer of at least 0, got {depth!r}")
    phi = elementwise(activation)
    length, rho, w, b = broadcast(*checked(q=q), checked_correlation(c), *checked(sigma_w=sigma_w, sigma_b=sigma_b))
    lengths, correlations = [length], [rho]
    for _ in range(depth):
        following = w.square() * second_moment(phi, length) + b.square()
        product = w.square() * cross_moment(phi, length, length, rho) + b.square()
        length, rho = following, (product / following).clamp(-1, 1)  # rounding
        lengths.append(length)
        correlations.append(rho)
    return Propagation(torch.stack(lengths), torch.stack(correlations))


def second_moment(phi: Activation, q: Tensor) -> Tensor:
    """E[phi(u)^2] for u ~ N(0, q)."""
    return expect(lambda u: phi(u).square(), q)


def cross_moment(phi: Activation, q1: Tensor, q2: Tensor, c: Tensor) -> Tensor:
    """E[phi(u_1) phi(u_2)] for centred Gaussian u of variances q1, q2 and correlation c."""
    return expect_pair(lambda a, b: phi(a) * phi(b), q1, q2, c)


def double(value: Any) -> Tensor:
    """A number, list or tensor as a float64 tensor; Python's floats keep all their digits."""
    return value.to(torch.float64) if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)


def checked(**values: Any) -> list[Tensor]:
    """The numbers as float64 tensors, or an error that names the one that is negative or not finite."""
    out = []
    for name, value in values.items():
        t = double(value)
        if not bool((t.isfinite() & (t >= 0)).all()):
            what = "a variance" if name.startswith(("q", "p")) else "a standard deviation"
            raise ValueError(f"{name} must be finite and not negative ({what}), got {value!r}")
        out.append(t)
    return out


def checked_correlation(c: Number) -> Tensor:
    """``c`` as a float64 tensor in [-1, 1], or an error; what rounding left outside is moved in."""
    t = double(c)
    if not bool((t.abs() <= 1 + 1e-9).all()):
        raise ValueError(f"c must be a correlation, in [-1, 1], got {c!r}")
    return t.clamp(-1, 1)
