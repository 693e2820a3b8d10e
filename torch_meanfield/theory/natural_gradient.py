r"""Natural gradient for populations of particles: the Fisher block of each, by conjugate gradients.

With J the Jacobian of the outputs by the particles and H the loss's Hessian by the outputs, the Fisher matrix of the
exponential families behind squared error and cross entropy is :math:`F = J^T H J`. A step solves :math:`(F + \lambda)
d = \nabla E` within each population, by products with F alone. Source: Amari 1998; Martens 2010 for the products; Lu et
al. 2020, section 6.2, leave this flow open for deep residual networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Closure = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Solve:
    """How one block's system was solved: ``iterations`` taken, ``residual`` the last over the first."""

    iterations: int
    residual: float


class NaturalGradient(Optimizer):
    r"""Gradient descent in the metric of the Fisher matrix, block by block.

    .. math:: \theta_b \leftarrow \theta_b - \eta\,(F_b + \lambda)^{-1}\,\nabla_b E, \qquad F_b = J_b^T H J_b

    Each parameter group is one block: all parameters in one group give the whole Fisher matrix, a group for each
    residual branch (or population of units) gives its blocks. On a squared loss that can be brought to 0 with full
    row rank J, the residual shrinks by :math:`1 - \eta` each step whatever the data, so the loss falls by
    :math:`(1 - \eta)^2`. Blocks do not see each other: m of them that can each do the whole work want lr = 1 / m.

    Args:
        params: Parameters, or groups of them.
        lr: The step :math:`\eta`.
        damping: :math:`\lambda`, in units of F.
        iterations: Conjugate gradient iterations of each block at most.
        tolerance: The residual over the gradient at which they end.

    Attributes:
        solves: Of the last step, a :class:`Solve` for each group that is not frozen.

    Raises:
        ValueError: A number out of its range.

    Source: Amari 1998; the rate: Zhang, Martens, Grosse 2019, Theorem 1.

    Example:
        >>> net, x, y = nn.Linear(3, 1).double(), torch.randn(9, 3).double(), torch.randn(9, 1).double()
        >>> optimizer = NaturalGradient(net.parameters(), lr=1.0, damping=0.0)
        >>> def closure():
        ...     out = net(x)
        ...     return (out - y).square().mean(), out
        >>> _ = optimizer.step(closure)  # least squares: one step solves it
        >>> bool(torch.autograd.grad(closure()[0], net.weight)[0].abs().max() < 1e-9)
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        *,
        damping: float = 1e-6,
        iterations: int = 100,
        tolerance: float = 1e-8,
    ) -> None:
        for name, value in (("lr", lr), ("damping", damping), ("tolerance", tolerance)):
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"iterations must be a positive integer, got {iterations!r}")
        super().__init__(params, {"lr": lr, "damping": damping, "iterations": iterations, "tolerance": tolerance})
        self.solves: list[Solve] = []

    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """One step.

        Args:
            closure: Runs the model and returns the loss and the outputs that it was computed from.

        Returns:
            The loss before the step.

        Raises:
            ValueError: No closure, a loss that is no scalar, that does not depend on the output, or that has no
                curvature in it; a loss or gradient that is not finite. Nothing has changed then.
        """
        loss, output = _evaluated(closure)
        (slope,) = _grad(loss, [output], create_graph=True)
        if slope is None or not slope.requires_grad:
            raise ValueError("the loss must depend on the output that the closure returned, and not only linearly")
        updates, solves = [], []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.requires_grad]
            if not params:
                continue
            grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, _grad(loss, params), strict=True)]
            if not all(bool(g.isfinite().all()) for g in grads):
                raise ValueError("a gradient is not finite; take a smaller lr or more damping")
            product = _fisher(params, output, slope, group["damping"])
            direction, solve = _conjugate_gradients(product, grads, group["iterations"], group["tolerance"])
            solves.append(solve)
            updates.append((params, direction, group["lr"]))
        with torch.no_grad():
            for params, direction, lr in updates:
                for p, d in zip(params, direction, strict=True):
                    p.sub_(d, alpha=lr)
        self.solves = solves
        return loss.detach()


def _evaluated(closure: Closure | None) -> tuple[Tensor, Tensor]:
    if closure is None:
        raise ValueError("step needs a closure that returns the loss and the output it was computed from")
    with torch.enable_grad():
        found = closure()
    if not isinstance(found, tuple) or len(found) != 2 or not all(isinstance(t, Tensor) for t in found):
        raise ValueError("the closure must return a pair (loss, output) of tensors")
    loss, output = found
    if loss.numel() != 1 or not bool(loss.isfinite().all()):
        raise ValueError(f"the loss must be a finite scalar, got {loss!r:.80}")
    if not loss.requires_grad or not output.requires_grad:
        raise ValueError("the loss and the output must depend on the parameters")
    return loss.reshape(()), output


def _grad(of: Tensor, by: list[Tensor], v: Tensor | None = None, create_graph: bool = False) -> list[Tensor | None]:
    return list(torch.autograd.grad(of, by, v, retain_graph=True, create_graph=create_graph, allow_unused=True))


def _fisher(
    params: list[Tensor], output: Tensor, slope: Tensor, damping: float
) -> Callable[[list[Tensor]], list[Tensor]]:
    """v -> (J^T H J + damping) v, from one graph: J v is the derivative of J^T w by w along v."""
    w = torch.zeros_like(output, requires_grad=True)
    with torch.enable_grad():
        back = _grad(output, params, w, create_graph=True)
    used = [(i, b) for i, b in enumerate(back) if b is not None]

    def product(v: list[Tensor]) -> list[Tensor]:
        out = [damping * x for x in v]
        if used:
            forward = torch.autograd.grad([b for _, b in used], w, [v[i] for i, _ in used], retain_graph=True)[0]
            (curved,) = _grad(slope, [output], forward)
            if curved is not None:
                for x, y in zip(out, _grad(output, params, curved), strict=True):
                    if y is not None:
                        x += y
        return out

    return product


def _conjugate_gradients(
    product: Callable[[list[Tensor]], list[Tensor]], b: list[Tensor], iterations: int, tolerance: float
) -> tuple[list[Tensor], Solve]:
    """x with ``product(x) = b``, from 0; on a plain Krylov space, so that it ends early where F is singular."""
    x, r = [torch.zeros_like(t) for t in b], [t.clone() for t in b]
    p, square = [t.clone() for t in r], _dot(r, r)
    first, taken = square, 0
    while taken < iterations and square > tolerance**2 * first:
        image = product(p)
        curvature = _dot(p, image)
        if not curvature > 0:  # F is 0 along what is left
            break
        a = square / curvature
        x = [s + a * t for s, t in zip(x, p, strict=True)]
        r = [s - a * t for s, t in zip(r, image, strict=True)]
        before, square = square, _dot(r, r)
        p = [s + square / before * t for s, t in zip(r, p, strict=True)]
        taken += 1
    return x, Solve(taken, math.sqrt(square / first) if first > 0 else 0.0)


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((s * t).sum()) for s, t in zip(a, b, strict=True))
