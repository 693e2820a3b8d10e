r"""Residual networks of L layers of M particles each in the mean-field scaling, trained; L and M go to infinity.

.. math:: Z^{l+1} = Z^l + \frac1{LM}\sum_m f(Z^l, \theta_{l,m}), \qquad
          \theta_{l,m} \leftarrow \theta_{l,m} - dt\,LM\,\partial E / \partial\theta_{l,m}

The factor LM gives each particle a velocity of order one: this is the particle form of the Wasserstein gradient flow of
Lu et al. 2020, (14), as L and M grow. Source: Ding et al. 2021 (arXiv:2105.14417), Ding et al. 2022 (arXiv:2110.02926).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]


def deep_output(field: Field, theta: Tensor, z: Tensor) -> Tensor:
    """The last state of networks that do not see each other.

    Args:
        field: ``field(z, theta)`` maps ``(..., N, d)`` and ``(..., M, p)`` to the mean of the particles' velocities,
            ``(..., N, d)``.
        theta: ``(..., L, M, p)``.
        z: The first state, ``(N, d)``.

    Returns:
        ``(..., N, d)``.
    """
    state = z.expand(*theta.shape[:-3], *z.shape)
    for layer in theta.unbind(-3):
        state = state + field(state, layer) / theta.shape[-3]
    return state


def train_deep_particles(
    field: Field, theta: Tensor, z: Tensor, y: Tensor, readout: Tensor, *, dt: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Gradient descent on half the mean squared error, with a time step for the particles that L and M do not change.

    Args:
        field, theta, z: See :func:`deep_output`.
        y: Targets, ``(N,)``.
        readout: The fixed w_1, ``(d,)``: a network's output is ``<w_1, Z^L>``.
        dt: Time step; the learning rate divided by LM.
        steps: Number of steps.

    Returns:
        Outputs ``(steps + 1, ..., N)`` and the final particles.

    Raises:
        ValueError: Shapes that do not fit, or a time step or a number of steps out of range.

    Source: Ding et al. 2021; Lu et al. 2020, (2).
    """
    if theta.dim() < 3:
        raise ValueError(f"theta must be (..., L, M, p), got shape {tuple(theta.shape)}")
    if z.dim() != 2 or y.shape != (len(z),) or readout.shape != (z.shape[1],):
        raise ValueError(
            f"z must be (N, d), y (N,) and readout (d,), got {tuple(z.shape)}, {tuple(y.shape)}, {tuple(readout.shape)}"
        )
    if not (math.isfinite(dt) and dt > 0):
        raise ValueError(f"dt must be positive and finite, got {dt!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be an integer, at least 0, got {steps!r}")
    mass, outputs = theta.shape[-3] * theta.shape[-2], []
    for _ in range(steps):
        with torch.enable_grad():
            at = theta.detach().requires_grad_()
            f = deep_output(field, at, z) @ readout
            (gradient,) = torch.autograd.grad((f - y).square().sum() / (2 * len(z)), at)
        outputs.append(f.detach())
        theta = theta.detach() - dt * mass * gradient
    with torch.no_grad():
        outputs.append(deep_output(field, theta, z) @ readout)
    return torch.stack(outputs), theta
