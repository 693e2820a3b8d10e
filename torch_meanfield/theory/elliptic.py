r"""Second-order elliptic equations on the unit cube, for a two-layer network with its boundary condition built in.

.. math:: \mathcal L u = \sum_{\alpha\beta} A_{\alpha\beta}(x)\,u_{x_\alpha x_\beta}
          + \sum_\alpha b_\alpha(x)\,u_{x_\alpha} + c(x)\,u = f \quad\text{in } (0, 1)^d,
          \qquad u = 0 \text{ on the boundary.}

Source: Yang 2022, "Optimization for PDE Solvers"; Luo and Yang 2020 (arXiv:2006.15733).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

Coefficient = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class EllipticOperator:
    """The coefficients of L.

    Attributes:
        a: Maps points ``(N, d)`` to symmetric positive matrices ``(N, d, d)``.
        b: Maps them to ``(N, d)``.
        c: Maps them to ``(N,)``.
    """

    a: Coefficient
    b: Coefficient
    c: Coefficient

    def __call__(self, u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """L u at points, by automatic differentiation of any function.

        Args:
            u: Maps one point ``(d,)`` to a scalar, by operations that ``torch.func`` can differentiate twice.
            x: ``(N, d)``.

        Returns:
            ``(N,)``.

        Raises:
            ValueError: Coefficients of other shapes, or an A that is not symmetric and positive.
        """
        a, b, c = self.at(x)
        value, slope, curvature = vmap(u)(x), vmap(grad(u))(x), vmap(jacrev(grad(u)))(x)
        applied: Tensor = (a * curvature).sum((1, 2)) + (b * slope).sum(1) + c * value
        return applied

    def at(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The coefficients at points, checked."""
        if x.dim() != 2:
            raise ValueError(f"x must be points (N, d), got shape {tuple(x.shape)}")
        n, d = x.shape
        a, b, c = self.a(x), self.b(x), self.c(x)
        for name, value, shape in (("a", a, (n, d, d)), ("b", b, (n, d)), ("c", c, (n,))):
            if tuple(value.shape) != shape:
                raise ValueError(f"coefficient {name} must be {shape} at {n} points, got {tuple(value.shape)}")
        if not torch.allclose(a, a.mT) or bool((torch.linalg.eigvalsh(a.detach())[:, 0] <= 0).any()):
            raise ValueError(
                "coefficient a must be symmetric and positive at every point: the equation is not elliptic"
            )
        return a, b, c


def bubble(x: Tensor) -> Tensor:
    r"""prod_i 4 x_i (1 - x_i): 0 on the boundary of the unit cube, 1 at its centre. ``(..., d)`` to ``(...)``."""
    return (4 * x * (1 - x)).prod(-1)


class BoundaryNet(nn.Module):
    r"""A two-layer network that vanishes on the boundary of the unit cube.

    .. math:: u(x) = B(x) \sum_{k=1}^N a_k \tanh(w_k\cdot x + \beta_k), \qquad B(x) = \prod_i 4 x_i (1 - x_i)

    Args:
        dim: d.
        width: N.
        output_scale: Standard deviation of a at the start.
        weight_scale: Standard deviation of w and of the biases at the start.
        generator: Generator of what is drawn.

    Raises:
        ValueError: A number below 1, or a scale that is negative.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        output_scale: float = 0.1,
        weight_scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or width < 1:
            raise ValueError(f"dim and width must be at least 1, got {dim} and {width}")
        for name, value in (("output_scale", output_scale), ("weight_scale", weight_scale)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
        shapes = (width,), (width, dim), (width,)
        device = None if generator is None else generator.device
        a, w, bias = (torch.randn(s, generator=generator, dtype=torch.float64, device=device) for s in shapes)
        self.a, self.w = nn.Parameter(output_scale * a), nn.Parameter(weight_scale * w)
        self.bias = nn.Parameter(weight_scale * bias)

    def forward(self, x: Tensor) -> Tensor:
        """u at points ``(..., d)``."""
        return bubble(x) * (torch.tanh(x @ self.w.T + self.bias) @ self.a)


class Collocation:
    """An equation at fixed points: everything that does not change in training is evaluated once.

    Args:
        operator: L.
        x: The points, ``(n, d)``, float64.
        f: The right-hand side there, ``(n,)``.

    Raises:
        ValueError: Shapes that do not fit, coefficients that are not elliptic.
    """

    def __init__(self, operator: EllipticOperator, x: Tensor, f: Tensor) -> None:
        a, b, c = operator.at(x)
        if f.shape != (len(x),):
            raise ValueError(f"f must be ({len(x)},), got {tuple(f.shape)}")
        self.x, self.f, self.n = x, f, len(x)
        value, slope, curvature = bubble(x), vmap(grad(bubble))(x), vmap(jacrev(grad(bubble)))(x)
        # L(B h) = B <A, D2h> + <2 A grad B + B b, grad h> + (L B) h
        self._second = value[:, None, None] * a
        self._first = 2 * (a @ slope[..., None]).squeeze(-1) + value[:, None] * b
        self._zeroth = (a * curvature).sum((1, 2)) + (b * slope).sum(1) + c * value

    def features(self, net: BoundaryNet) -> Tensor:
        """L of B(x) tanh(w_k . x + beta_k), of which L u is the sum with weights a_k: ``(n, N)``."""
        t = torch.tanh(self.x @ net.w.T + net.bias)
        slope = 1 - t.square()
        quadratic = torch.einsum("nij,ki,kj->nk", self._second, net.w, net.w)
        features: Tensor = -2 * t * slope * quadratic + slope * (self._first @ net.w.T) + t * self._zeroth[:, None]
        return features

    def risk(self, net: BoundaryNet) -> Tensor:
        r"""R_S = 1/(2n) sum_i (L u(x_i) - f(x_i))^2."""
        return (self.features(net) @ net.a - self.f).square().mean() / 2

    def outer_gram(self, net: BoundaryNet) -> Tensor:
        r"""K^(a) of the network: the mean over units of products of features, ``(n, n)``; N times it is the tangent
        kernel of the output weights, whose smallest eigenvalue bounds the rate: R_S(t) <= exp(-N lambda t / n) R_S(0)
        (see :func:`~torch_meanfield.theory.linearised.linear_rate_bound`)."""
        features = self.features(net).detach()
        return features @ features.T / features.shape[1]
