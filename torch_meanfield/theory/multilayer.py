r"""How a network with two hidden layers fluctuates about its mean-field limit: the second-order limit.

.. math:: f(x) = \frac1{n_2}\sum_j w_{3,j}\,\phi(H_j), \qquad
          H_j = \frac1{n_1}\sum_i w_{2,ij}\,\phi(\langle w_{1,i}, x\rangle)

Neurons are drawn independently: neuron i of the first layer has a type :math:`c_i`, neuron j of the second a type
:math:`c'_j`, and the weights at the start are functions of types, :math:`w_1(c_i)`, :math:`w_2(c_i, c'_j)`,
:math:`w_3(c'_j)` (the neuronal embedding). Each weight descends at the rate dt times what its gradient was divided by:
:math:`n_1`, :math:`n_1 n_2` and :math:`n_2`. In the limit of width the two laws of types determine f at all times; a
finite network replaces them by samples. What f does then is linear to first order in what the samples miss,

.. math:: \sqrt n\,(f_n - f) \to \int \psi_1\,d\omega_1 + \int \psi_2\,d\omega_2

with independent Gaussian noises :math:`\omega` of the two samples, and :math:`\psi` the derivative of the *trained*
output by the weight of a type, through the whole training: it carries the dependence of neurons across time and depth.

Source: Pham and Nguyen 2021 (arXiv:2110.15954), the second-order mean-field limit, for three layers in discrete time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torch_meanfield.theory.activation import Activation, elementwise, value_and_derivative


class Layers(NamedTuple):
    """The weights of one network, or of many: ``(..., n1, d)``, ``(..., n1, n2)`` and ``(..., n2)``."""

    first: Tensor
    second: Tensor
    third: Tensor


class Shares(NamedTuple):
    """What each type of neuron holds of its law, ``(..., n1)`` and ``(..., n2)``; of sum 1. A network: 1 / n each."""

    first: Tensor
    second: Tensor


def train_layers(
    layers: Layers, x: Tensor, y: Tensor, *, dt: float, steps: int, activation: Activation = torch.tanh,
    shares: Shares | None = None,
) -> tuple[Tensor, Layers]:  # fmt: skip
    """Full-batch gradient descent on (1 / 2N) sum (f - y)^2 in the scaling of the mean field.

    Args:
        layers: Weights at the start.
        x: ``(N, d)``; a constant column makes a bias.
        y: ``(N,)``.
        dt: Time step.
        steps: Number of steps.
        activation: An element-wise callable, of both hidden layers.
        shares: Of types of neurons; ``None``: a network.

    Returns:
        Outputs ``(steps + 1, ..., N)`` and the weights at the end.

    Raises:
        ValueError: Shapes that do not fit, a number out of its range, or an activation that is not element-wise.

    Source: Pham and Nguyen 2021, gradient descent of the multilayer network.
    """
    phi = elementwise(activation)
    held = _checked(layers, x, y, dt, steps, shares)
    outputs = []
    with torch.no_grad():
        for step in range(steps + 1):
            f, *moved = _step(phi, x, y, dt, held, *layers)
            outputs.append(f)
            layers = Layers(*moved) if step < steps else layers
    return torch.stack(outputs), layers


def layer_influences(
    layers: Layers, x: Tensor, y: Tensor, *, dt: float, steps: int, activation: Activation = torch.tanh,
    shares: Shares | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r"""The derivatives :math:`\psi_1, \psi_2` of the trained outputs by the share of a type, less their means.

    Args:
        layers: One set of types that stands for the laws; else as :func:`train_layers`.

    Returns:
        ``(N, n1)`` and ``(N, n2)``.

    Raises:
        ValueError: As :func:`train_layers`, or several networks at once.

    Source: Pham and Nguyen 2021: R of the second-order limit, here for a unit of noise in each type.
    """
    phi = elementwise(activation)
    held = Shares(*(t.detach().requires_grad_() for t in _checked(layers, x, y, dt, steps, shares)))
    if layers.third.dim() != 1:
        raise ValueError(f"influences are of one set of types, got layers with {tuple(layers.third.shape)} in front")
    with torch.enable_grad():
        now = Layers(*(t.detach() for t in layers))
        for _ in range(steps):  # each step is done again on the way back, so that only weights are kept
            now = Layers(*checkpoint(_step, phi, x, y, dt, held, *now, use_reentrant=False)[1:])
        f = _step(phi, x, y, dt, held, *now)[0]
    found = [torch.autograd.grad(f[i], held, retain_graph=i + 1 < len(f)) for i in range(len(f))]
    psi = [torch.stack(parts) for parts in zip(*found, strict=True)]
    first, second = (p - (p @ s.detach())[:, None] for p, s in zip(psi, held, strict=True))
    return first, second


def multilayer_covariance(
    layers: Layers, x: Tensor, y: Tensor, *, dt: float, steps: int, activation: Activation = torch.tanh,
    shares: Shares | None = None, ratio: float = 1.0,
) -> Tensor:  # fmt: skip
    r"""The covariance of :math:`\lim \sqrt{n_1}\,(f_n - f)` on the samples, after training.

    .. math:: \int\psi_1\psi_1^T d\mu_1 + \frac{n_1}{n_2}\int\psi_2\psi_2^T d\mu_2

    Args:
        ratio: n1 / n2, above 0; else as :func:`layer_influences`.

    Returns:
        ``(N, N)``.

    Raises:
        ValueError: As :func:`layer_influences`, or a ratio that is not positive.

    Source: Pham and Nguyen 2021, the central limit theorem of the output.
    """
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"ratio must be positive and finite, got {ratio!r}")
    held = _checked(layers, x, y, dt, steps, shares)
    psi = layer_influences(layers, x, y, dt=dt, steps=steps, activation=activation, shares=shares)
    first, second = ((p * s) @ p.T for p, s in zip(psi, held, strict=True))
    return first + ratio * second


def _step(
    phi: Activation, x: Tensor, y: Tensor, dt: float, shares: Shares, first: Tensor, second: Tensor, third: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs ``(..., N)``, and the weights after one step."""
    one, one_slope = value_and_derivative(phi, first @ x.T)  # (..., n1, N)
    held_one = shares.first[..., None] * one
    two, two_slope = value_and_derivative(phi, second.transpose(-1, -2) @ held_one)  # (..., n2, N)
    f = (shares.second[..., None] * third[..., None] * two).sum(-2)
    error = ((f - y) / len(y))[..., None, :]
    back = error * third[..., None] * two_slope  # (..., n2, N): what a neuron of the second layer is told
    told = second @ (shares.second[..., None] * back)  # (..., n1, N)
    moved = (
        first - dt * ((told * one_slope) @ x),
        second - dt * (one @ back.transpose(-1, -2)),
        third - dt * (error * two).sum(-1),
    )
    return f, *moved


def _checked(layers: Layers, x: Tensor, y: Tensor, dt: float, steps: int, shares: Shares | None) -> Shares:
    """The shares, or an error."""
    first, second, third = layers
    if x.dim() != 2 or y.shape != (len(x),):
        raise ValueError(f"x must be (N, d) and y (N,), got {tuple(x.shape)} and {tuple(y.shape)}")
    *many, n1, n2 = second.shape if second.dim() >= 2 else (0, 0)
    if second.dim() < 2 or first.shape != (*many, n1, x.shape[1]) or third.shape != (*many, n2):
        got = ", ".join(str(tuple(t.shape)) for t in layers)
        raise ValueError(f"layers must be (..., n1, {x.shape[1]}), (..., n1, n2) and (..., n2), got {got}")
    if not (math.isfinite(dt) and dt > 0):
        raise ValueError(f"dt must be positive and finite, got {dt!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be an integer, at least 0, got {steps!r}")
    if shares is None:
        return Shares(third.new_full((n1,), 1 / n1), third.new_full((n2,), 1 / n2))
    for name, share, n in (("first", shares.first, n1), ("second", shares.second, n2)):
        if share.dim() == 0 or share.shape[-1] != n:
            raise ValueError(f"shares.{name} must end in {n} for these layers, got shape {tuple(share.shape)}")
    return shares
