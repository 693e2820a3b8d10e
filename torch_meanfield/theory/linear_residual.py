r"""Residual networks that are linear in what they learn: the linear rate of gradient descent, its constant computed.

.. math:: z^{l+1} = z^l + \frac1L\, W^l\varphi^l(z^l), \qquad F(x) = B z^L

with features :math:`\varphi^l` that are drawn once, here :math:`\sqrt{2/r}\cos(U z + b)`: as their number r grows, each
residual is any function of the reproducing kernel space of :math:`e^{-|z - z'|^2 / 2\ell^2}`. For the loss :math:`E =
\frac1{2N}\sum_i |F(x_i) - y_i|^2` and gradient flow in the scaling of depth, :math:`\dot W^l = -L\,\partial E /
\partial W^l`, the squared gradient is a quadratic form of the residuals. Its smallest eigenvalue is the constant of the
local inequality of Polyak and Lojasiewicz, :math:`|\nabla E|^2 \ge 2\mu E`, by which every critical point there is a
global minimum and E falls like :math:`e^{-2\mu t}`.

Source: Barboni, Peyré, Vialard 2021 (arXiv:2112.05531), the residual model, the local inequality and its constant.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class LinearResNet(nn.Module):
    """A residual network with random Fourier features, whose outer weights alone are trained, from 0 on.

    Args:
        dim: Of the inputs and of every layer.
        outputs: Rows of B, orthonormal and fixed; at most ``dim``.
        layers: L.
        features: r, of each residual.
        length: The length scale of the kernel.
        train_features: Train U and b as well: residuals with one hidden layer.
        seed: Of a generator of its own.

    Raises:
        ValueError: A number out of its range.

    Shapes: ``(N, dim)`` to ``(N, outputs)``; float64.

    Source: Barboni, Peyré, Vialard 2021; Rahimi and Recht 2007 for the features.
    """

    def __init__(
        self, dim: int, outputs: int, layers: int, features: int, *, length: float = 1.0, train_features: bool = False,
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("dim", dim), ("outputs", outputs), ("layers", layers), ("features", features)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if outputs > dim:
            raise ValueError(
                f"outputs must be at most dim={dim}, since they are read from the last layer; got {outputs}"
            )
        if not (math.isfinite(length) and length > 0):
            raise ValueError(f"length must be positive and finite, got {length!r}")
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(layers, features, dim, generator=generator, dtype=torch.float64) / length
        phases = 2 * math.pi * torch.rand(layers, features, generator=generator, dtype=torch.float64)
        square = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(torch.zeros(layers, dim, features, dtype=torch.float64))
        self.directions = nn.Parameter(directions, requires_grad=train_features)
        self.phases = nn.Parameter(phases, requires_grad=train_features)
        self.register_buffer("read_out", torch.linalg.qr(square)[0][:outputs].clone())
        self.read_out: Tensor

    def features(self, z: Tensor, layer: int) -> Tensor:
        """The features of a layer, ``(N, r)``."""
        r = self.phases.shape[1]
        return math.sqrt(2 / r) * torch.cos(z @ self.directions[layer].T + self.phases[layer])

    def forward(self, x: Tensor) -> Tensor:
        """The outputs."""
        z, depth = x, len(self.weight)
        for layer in range(depth):
            z = z + self.features(z, layer) @ self.weight[layer].T / depth
        return z @ self.read_out.T


class PolyakLojasiewicz(NamedTuple):
    r"""Constants :math:`\mu` with :math:`|\nabla E|^2 \ge 2\mu E` at the given weights, for any targets.

    Attributes:
        tangent: The largest such constant: the smallest eigenvalue of the tangent kernel over N; the final rate.
        bound: The one of the theory, from the kernel of features and the adjoint each for itself; at most ``tangent``.
    """

    tangent: Tensor
    bound: Tensor


@torch.no_grad()
def polyak_lojasiewicz(model: LinearResNet, x: Tensor, *, max_bytes: int = 1 << 30) -> PolyakLojasiewicz:
    r"""The constant of the local inequality, by one pass forwards and one backwards.

    .. math::
        \Theta_{ij} = \frac1L\sum_l \varphi^l(z_i^l)\cdot\varphi^l(z_j^l)\; P_i^{l+1} P_j^{l+1\,T}, \qquad
        \mu = \frac{\lambda_{\min}(\Theta)}N \;\ge\;
        \frac1{NL}\sum_l \lambda_{\min}(K^l)\,\min_i \sigma_{\min}(P_i^{l+1})^2

    with :math:`K^l` the kernel of the features and :math:`P_i^l = \partial F(x_i) / \partial z_i^l`.

    Args:
        model: Its outer weights count as the trained ones.
        x: ``(N, dim)``.
        max_bytes: What the tangent kernel of N times the outputs may take.

    Raises:
        ValueError: Inputs of another shape, or a kernel beyond ``max_bytes``, with the number of inputs that fits.

    Source: Barboni, Peyré, Vialard 2021, the local Polyak-Lojasiewicz inequality.

    Example:
        >>> model = LinearResNet(4, 2, layers=3, features=200, seed=1)
        >>> found = polyak_lojasiewicz(model, torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double())
        >>> bool(found.tangent > 0), bool(found.bound <= found.tangent)
        (True, True)
    """
    outputs, dim = model.read_out.shape
    if x.dim() != 2 or x.shape[1] != dim or len(x) == 0:
        raise ValueError(f"x must be (N, {dim}), got shape {tuple(x.shape)}")
    n, depth = len(x), len(model.weight)
    needed = 8 * (n * outputs) ** 2
    if needed > max_bytes:
        fits = int((max_bytes / 8) ** 0.5) // outputs
        raise ValueError(
            f"the tangent kernel of {n} inputs takes {needed:,} bytes, more than max_bytes={max_bytes:,}; {fits} fit"
        )
    layers = [x]
    for layer in range(depth):
        layers.append(layers[-1] + model.features(layers[-1], layer) @ model.weight[layer].T / depth)
    adjoint = model.read_out.expand(n, outputs, dim)
    tangent = torch.zeros(n, outputs, n, outputs, dtype=torch.float64)
    bound = torch.zeros((), dtype=torch.float64)
    for layer in reversed(range(depth)):
        phi = model.features(layers[layer], layer)
        kernel = phi @ phi.T
        flat = adjoint.reshape(n * outputs, dim)
        tangent += kernel[:, None, :, None] * (flat @ flat.T).view(tangent.shape) / depth
        bound += (
            torch.linalg.eigvalsh(kernel)[0].clamp_min(0) * torch.linalg.svdvals(adjoint)[:, -1].min().square() / depth
        )
        u, phase = model.directions[layer], model.phases[layer]
        slope = -math.sqrt(2 / len(phase)) * torch.sin(layers[layer] @ u.T + phase)  # (N, r)
        adjoint = adjoint + ((adjoint @ model.weight[layer]) * slope[:, None, :]) @ u / depth
    smallest = torch.linalg.eigvalsh(tangent.view(n * outputs, n * outputs))[0]
    return PolyakLojasiewicz(smallest / n, bound / n)
