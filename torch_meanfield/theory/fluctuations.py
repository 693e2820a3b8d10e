r"""How a two-layer network fluctuates about its mean-field limit: law of large numbers and central limit theorem.

The network is :math:`f_n(x) = \frac1n \sum_i \varphi(x, \theta_i)` with :math:`\theta_i(0)` drawn independently from
:math:`\mu_0`, trained by gradient descent on :math:`E = \frac12 \int (f_n - y)^2 d\nu`, :math:`\nu` the mean over given
samples, with the time step times n as its learning rate. The limit is the same flow of the measure itself, which is
represented here by very many evenly spread particles, which may carry weights. Source: Rotskoff 2020, (25)-(32),
Sirignano and Spiliopoulos 2018 (arXiv:1808.09372), Rotskoff and Vanden-Eijnden 2018 (arXiv:1805.00915).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Unit = Callable[[Tensor, Tensor], Tensor]


def gaussian_particles(count: int, dim: int, *, seed: int = 0) -> Tensor:
    """A standard normal law as evenly spread particles: scrambled Sobol points through the normal quantile.

    Their means err by about 1/count where those of independent draws err by 1/sqrt(count). A product of Gauss-Hermite
    rules does worse here: where the flow parts the particles, the trained unit is steep in where it began.

    Args:
        count: A power of 2, for which the points are balanced.
        dim: Number of coordinates.
        seed: Seed of the scrambling.

    Returns:
        ``(count, dim)``, float64.

    Raises:
        ValueError: A number out of its range.

    Source: Owen 1998, scrambled nets.
    """
    for name, value in (("count", count), ("dim", dim)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if count & (count - 1):
        raise ValueError(f"count must be a power of 2, got {count}; {1 << count.bit_length()} is the next one")
    engine = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    points: Tensor = engine.draw(count, dtype=torch.float64)
    normal: Tensor = torch.special.ndtri(points.clamp(2**-40, 1 - 2**-40))
    return normal


def train_particles(
    unit: Unit, theta: Tensor, x: Tensor, y: Tensor, *, dt: float, steps: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Gradient descent of weighted particles on the squared loss.

    .. math:: \theta_j \leftarrow \theta_j - dt\,\nabla V(\theta_j), \qquad
              V(\theta) = \frac1N\sum_x (f(x) - y(x))\,\varphi(x, \theta),
              \quad f = \sum_j w_j\,\varphi(\cdot,
              \theta_j)

    Args:
        unit: ``unit(x, theta)`` maps ``(N, d)`` and ``(..., n, p)`` to ``(..., N, n)``, the particles independently.
        theta: ``(..., n, p)``: one network, or many that do not see each other.
        x: ``(N, d)``.
        y: ``(N,)``.
        dt: Time step; the learning rate of a network of n units divided by n.
        steps: Number of steps.
        weights: ``(n,)``; ``None``: 1/n each, a network.

    Returns:
        Outputs ``(steps + 1, ..., N)`` and the final particles.

    Raises:
        ValueError: Shapes that do not fit, or a time step or a number of steps out of range.

    Source: Rotskoff 2020, (21), (22) with F of (24).
    """
    weights = _checked(unit, theta, x, y, dt, steps, weights)
    outputs = []
    for _ in range(steps):
        f, theta = _step(unit, theta, weights, x, y, dt)
        outputs.append(f)
    outputs.append(unit(x, theta) @ weights)
    return torch.stack(outputs), theta


def fluctuation_covariance(
    unit: Unit, theta: Tensor, x: Tensor, y: Tensor, *, dt: float, steps: int, weights: Tensor | None = None
) -> Tensor:
    r"""The covariance of :math:`g_t = \lim \sqrt n\,(f_n - f)` on the samples, after training.

    What :math:`f_t` does when the initial measure changes is linear to first order: :math:`g_t(x) = \int
    \psi_t(x, \theta)\,\omega_0(d\theta)` with :math:`\psi_t(x, \theta_j) = \partial f_t(x) / \partial w_j`, taken
    through the whole training (it solves (31)). The noise :math:`\omega_0` is that of independent draws, so that

    .. math:: E[g_t(x) g_t(x')] = \int \psi_t(x)\psi_t(x')\,d\mu_0 - \int\psi_t(x)\,d\mu_0 \int\psi_t(x')\,d\mu_0.

    Args:
        unit, x, y, dt, steps: As for :func:`train_particles`.
        theta: Particles that stand for the initial measure, ``(m, p)``.
        weights: Theirs, ``(m,)``; ``None``: equal.

    Returns:
        ``(N, N)``.

    Raises:
        ValueError: As :func:`train_particles`.

    Source: Rotskoff 2020, (31) and the proposition below it; arXiv:1808.09372.
    """
    weights = _checked(unit, theta, x, y, dt, steps, weights).detach().requires_grad_()
    with torch.enable_grad():
        now = theta.detach()
        for _ in range(steps):  # each step is done again on the way back, so that only particles are kept
            _, now = checkpoint(_step, unit, now, weights, x, y, dt, use_reentrant=False)
        f = unit(x, now) @ weights
    psi = torch.stack([torch.autograd.grad(f[i], weights, retain_graph=i + 1 < len(f))[0] for i in range(len(f))])
    weights = weights.detach()
    centred = psi - (psi @ weights)[:, None]
    return (centred * weights) @ centred.T


def monte_carlo_variance(unit: Unit, theta: Tensor, x: Tensor) -> Tensor:
    r"""The right-hand side of (32): n times the squared error of n independent draws from the measure itself.

    .. math:: \int K(\theta, \theta)\,d\mu - \int f^2\,d\nu
              = \int\left(\int\varphi^2 d\mu - \Big(\int\varphi\,d\mu\Big)^2\right)d\nu

    Args:
        unit, x: As for :func:`train_particles`.
        theta: Particles that stand for the measure, ``(m, p)``.

    Returns:
        A scalar.

    Source: Rotskoff 2020, (32).
    """
    phi = unit(x, theta)
    return (phi.square().mean(-1) - phi.mean(-1).square()).mean()


def _step(unit: Unit, theta: Tensor, weights: Tensor, x: Tensor, y: Tensor, dt: float) -> tuple[Tensor, Tensor]:
    """The outputs, and the particles after one step; differentiable in ``theta`` and ``weights``."""
    through = weights.requires_grad  # then the step itself is to be differentiated
    with torch.enable_grad():
        at = theta if theta.requires_grad else theta.detach().requires_grad_()
        phi = unit(x, at)
        f = phi @ weights
        residual = ((f - y) / len(y))[..., None].expand_as(phi)
        if not through:
            residual = residual.detach()
        (gradient,) = torch.autograd.grad(phi, at, residual, create_graph=through)
    return (f, at - dt * gradient) if through else (f.detach(), theta - dt * gradient)


def _checked(unit: Unit, theta: Tensor, x: Tensor, y: Tensor, dt: float, steps: int, weights: Tensor | None) -> Tensor:
    if theta.dim() < 2:
        raise ValueError(f"theta must be (..., n, p), got shape {tuple(theta.shape)}")
    n = theta.shape[-2]
    if weights is None:
        weights = theta.new_full((n,), 1 / n)
    if weights.shape != (n,):
        raise ValueError(f"weights must be ({n},) for these particles, got shape {tuple(weights.shape)}")
    if x.dim() != 2 or y.shape != (len(x),):
        raise ValueError(f"x must be (N, d) and y (N,), got {tuple(x.shape)} and {tuple(y.shape)}")
    if not (math.isfinite(dt) and dt > 0):
        raise ValueError(f"dt must be positive and finite, got {dt!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be an integer, at least 0, got {steps!r}")
    with torch.no_grad():
        shape = tuple(unit(x, theta[..., :1, :]).shape)
    if shape != (*theta.shape[:-2], len(x), 1):
        raise ValueError(
            f"unit must map (N, d) and (..., n, p) to (..., N, n); for n = 1 it returned {shape} where "
            f"{(*theta.shape[:-2], len(x), 1)} was expected"
        )
    return weights
