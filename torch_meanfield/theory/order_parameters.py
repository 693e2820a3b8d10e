r"""One-pass SGD of a two-layer erf network in high dimension, as an ordinary differential equation.

Student and teacher are :math:`\hat f(x) = \frac1p \sum_j \sigma(w_j\cdot x/\sqrt d)` and
:math:`f(x) = \frac1k \sum_r \sigma(w^*_r\cdot x/\sqrt d)` with :math:`\sigma(z) = \operatorname{erf}(z/\sqrt2)` and
:math:`x \sim N(0, I_d)`; labels carry noise of variance :math:`\Delta`. As d grows, all that SGD on
:math:`\frac12(\hat f - y)^2` does is seen in the overlaps :math:`Q = WW^T/d` and :math:`M = WW^{*T}/d`, which follow a
closed equation. Source: Veiga, Stephan, Loureiro, Krzakala, Zdeborová 2022 (arXiv:2202.00293); Saad and Solla 1995.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_HALF_PI = math.pi / 2


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Order parameters; leading dimensions are times or settings.

    Attributes:
        q: ``(..., p, p)``, :math:`w_j\\cdot w_l / d`.
        m: ``(..., p, k)``, :math:`w_j\\cdot w^*_r / d`.
        t: ``(..., k, k)``, :math:`w^*_r\\cdot w^*_s / d`.
    """

    q: Tensor
    m: Tensor
    t: Tensor

    @staticmethod
    def of(student: Tensor, teacher: Tensor) -> Overlaps:
        """The overlaps of weights ``(p, d)`` and ``(k, d)``.

        Raises:
            ValueError: Weights that are no matrices of one width.
        """
        if student.dim() != 2 or teacher.dim() != 2 or student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"student and teacher must be (p, d) and (k, d), got {tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        d = student.shape[1]
        w, v = student.detach().double(), teacher.detach().double()
        return Overlaps(w @ w.T / d, w @ v.T / d, v @ v.T / d)

    def covariance(self) -> Tensor:
        """Of the fields of all units, the student's first: ``(..., p + k, p + k)``."""
        above = torch.cat([self.q, self.m], -1)
        return torch.cat([above, torch.cat([self.m.mT, self.t], -1)], -2)


def population_risk(overlaps: Overlaps) -> Tensor:
    r"""Half the mean squared difference of student and teacher, without the label noise.

    Returns:
        ``(...)``; from :math:`E[\sigma(u)\sigma(v)] = \frac2\pi\arcsin\frac{C_{uv}}{\sqrt{(1+C_{uu})(1+C_{vv})}}`.

    Source: Saad and Solla 1995.
    """
    c = overlaps.covariance()
    signs = _signs(overlaps)
    return (signs @ _products(c) @ signs) / 2


def sgd_velocity(overlaps: Overlaps, *, rate: float, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    r"""The time derivatives of Q and M, for the time :math:`\tau` = steps x learning rate / (p d).

    With the error :math:`e = f(x) + \sqrt\Delta\,\zeta - \hat f(x)` and the fields :math:`\lambda = Wx/\sqrt d`,

    .. math::
        \dot M_{jr} = E[\sigma'(\lambda_j)\lambda^*_r e], \qquad
        \dot Q_{jl} = E[(\sigma'(\lambda_j)\lambda_l + \sigma'(\lambda_l)\lambda_j) e]
                      + \frac{\gamma}{p}\,E[\sigma'(\lambda_j)\sigma'(\lambda_l) e^2].

    The averages over Gaussian fields are closed forms. The last term is what SGD adds to the flow of the risk; that
    the learning rate enters as :math:`\gamma/p` is why width and a small learning rate do the same.

    Args:
        overlaps: Overlaps of the weights.
        rate: :math:`\gamma / p`, the learning rate over the width.
        noise: :math:`\Delta`.

    Returns:
        The derivatives of ``q`` and ``m``, shaped like them.

    Source: arXiv:2202.00293; Saad and Solla 1995 for the averages.
    """
    p = overlaps.q.shape[-1]
    c = overlaps.covariance()
    signs = -_signs(overlaps)  # e = sum_a signs_a sigma(lambda_a)
    # first[j, b] = E[sigma'(lambda_j) lambda_b e] for the student's units j and all units b
    first = (_slope_field_value(c, p) * signs).sum(-1)
    gain = first[..., :p] + first[..., :p].mT
    if rate:
        pairs = _slope_slope_value_value(c, p)
        square = torch.einsum("...jlab,a,b->...jl", pairs, signs, signs)
        gain = gain + rate * (square + noise * _slope_slope(c, p))
    return gain, first[..., p:]


def integrate_sgd(overlaps: Overlaps, *, rate: float, duration: float, steps: int, noise: float = 0.0) -> Overlaps:
    r"""Overlaps over time, by the classical Runge-Kutta method.

    Args:
        overlaps: At the start.
        rate: Learning rate over width, at least 0; 0 is the flow of the population risk.
        duration: In :math:`\tau` = SGD steps x learning rate / (p d).
        steps: Steps of the integration.
        noise: Variance of the label noise, at least 0.

    Returns:
        Overlaps of shape ``(steps + 1, ...)``.

    Raises:
        ValueError: A number out of its range, or overlaps of no weights (a covariance that is not positive).
        RuntimeError: The overlaps grow without bound: the learning rate is beyond stability, or ``steps`` too few.

    Source: arXiv:2202.00293, the deterministic limit of high dimension.
    """
    for name, value in (("rate", rate), ("noise", noise)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
    if not (math.isfinite(duration) and duration > 0):
        raise ValueError(f"duration must be positive and finite, got {duration!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    if torch.linalg.eigvalsh(overlaps.covariance()).min() < -1e-9:
        raise ValueError("overlaps belong to no weights: their joint covariance has a negative eigenvalue")
    q, m, t = (x.double() for x in (overlaps.q, overlaps.m, overlaps.t))
    h = duration / steps

    def velocity(q: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        return sgd_velocity(Overlaps(q, m, t), rate=rate, noise=noise)

    path = [(q, m)]
    for step in range(steps):
        a, b = velocity(q, m)
        c, d = velocity(q + h / 2 * a, m + h / 2 * b)
        e, f = velocity(q + h / 2 * c, m + h / 2 * d)
        g, i = velocity(q + h * e, m + h * f)
        q, m = q + h / 6 * (a + 2 * c + 2 * e + g), m + h / 6 * (b + 2 * d + 2 * f + i)
        if not bool(torch.isfinite(q).all()):
            raise RuntimeError(
                f"the overlaps left all bounds after {step + 1} of {steps} steps of {h:g}: rate={rate:g} is beyond "
                f"stability, or more steps are needed"
            )
        path.append((q, m))
    return Overlaps(torch.stack([q for q, _ in path]), torch.stack([m for _, m in path]), t.expand(len(path), *t.shape))


def _signs(overlaps: Overlaps) -> Tensor:
    p, k = overlaps.m.shape[-2:]
    return torch.cat([overlaps.q.new_full((p,), 1 / p), overlaps.q.new_full((k,), -1 / k)])


def _products(c: Tensor) -> Tensor:
    """E[sigma(u_a) sigma(u_b)]."""
    scale = (1 + c.diagonal(dim1=-2, dim2=-1)).rsqrt()
    return torch.asin(c * scale[..., :, None] * scale[..., None, :]) / _HALF_PI


def _slope_field_value(c: Tensor, p: int) -> Tensor:
    """E[sigma'(u_j) u_b sigma(u_a)] at [..., j, b, a], j of the student."""
    own = 1 + c.diagonal(dim1=-2, dim2=-1)
    j = own[..., :p, None, None]
    rows = c[..., :p, :]
    numerator = c[..., None, :, :] * j - rows[..., :, :, None] * rows[..., :, None, :]
    determinant = j * own[..., None, None, :] - rows[..., :, None, :].square()
    return numerator / (j * determinant.sqrt()) / _HALF_PI


def _slope_slope(c: Tensor, p: int) -> Tensor:
    """E[sigma'(u_j) sigma'(u_l)]."""
    return _determinant(c, p).rsqrt() / _HALF_PI


def _determinant(c: Tensor, p: int) -> Tensor:
    own = 1 + c.diagonal(dim1=-2, dim2=-1)[..., :p]
    return own[..., :, None] * own[..., None, :] - c[..., :p, :p].square()


def _slope_slope_value_value(c: Tensor, p: int) -> Tensor:
    """E[sigma'(u_j) sigma'(u_l) sigma(u_a) sigma(u_b)] at [..., j, l, a, b].

    Under the weight sigma'(u_j) sigma'(u_l) the fields stay Gaussian, with the covariance S that conditioning on two
    more unit-variance observations leaves; an arcsine of S is then all.
    """
    rows, determinant = c[..., :p, :], _determinant(c, p)
    own = 1 + c.diagonal(dim1=-2, dim2=-1)[..., :p]
    first, second = rows[..., :, None, :], rows[..., None, :, :]  # [j, -, a], [-, l, a]
    j, n = own[..., :, None, None, None], own[..., None, :, None, None]
    shared = c[..., :p, :p, None, None]
    change = (
        n * first[..., :, None] * first[..., None, :]
        + j * second[..., :, None] * second[..., None, :]
        - shared * (first[..., :, None] * second[..., None, :] + second[..., :, None] * first[..., None, :])
    ) / determinant[..., None, None]
    s = c[..., None, None, :, :] - change
    return _products(s) * _slope_slope(c, p)[..., None, None]
