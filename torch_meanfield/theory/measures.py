r"""Steps of optimisation over probability measures, on weighted particles.

A measure is :math:`\mu = \sum_j w_j \delta_{\theta_j}`; a convex energy E[mu] has the first variation V(theta, mu),
its potential. The proximal point of E in a metric is one step of its gradient flow (Rotskoff 2020, (16)): in relative
entropy only the weights move (36), in W_2 only the positions; taken in turn the two give the Wasserstein-Fisher-Rao
flow (34).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Potential = Callable[[Tensor, Tensor, Tensor], Tensor]


def kl_proximal_step(
    weights: Tensor, potential: Tensor, *, step: float, temperature: float = 0.0, base: Tensor | None = None
) -> Tensor:
    r"""One mirror-descent step of the weights in relative entropy.

    .. math:: \mu_{k+1} = \operatorname{argmin}_\mu
              \int V d\mu + T\,\mathrm{KL}(\mu|\pi) + \tfrac1s \mathrm{KL}(\mu|\mu_k)
              \;\propto\; \left(\mu_k\, \pi^{sT} e^{-sV}\right)^{1/(1 + sT)}

    At temperature T = 0 this is :math:`\mu_k e^{-s (V - \bar V)}` up to its mass, birth and death with :math:`s =
    \alpha\tau`. A convex energy whose potential changes by at most L per unit of mass that moves falls, for s <= 1/L,
    to within :math:`T\,\mathrm{KL}(\mu_*|\mu_0) / ((1 + sT)^k - 1)` of its minimum in k steps, which for T = 0 is
    :math:`\mathrm{KL}(\mu_*|\mu_0) / (s k)`.

    Args:
        weights: ``(n,)``, positive, of sum 1.
        potential: V at the particles, ``(n,)``.
        step: s, positive.
        temperature: T, at least 0: of an entropy that is part of the energy.
        base: :math:`\pi`, ``(n,)``; ``None``: uniform.

    Returns:
        ``(n,)``, of sum 1; the arguments are left as they are.

    Raises:
        ValueError: Shapes that do not fit, weights that are not positive, a number out of its range.

    Source: Rotskoff 2020, (36) and "closely related to mirror descent"; Beck and Teboulle 2003 for the rate.

    Example:
        >>> kl_proximal_step(torch.tensor([0.5, 0.5]), torch.tensor([0.0, math.log(3.0)]), step=1.0)
        tensor([0.7500, 0.2500])
    """
    if weights.dim() != 1 or potential.shape != weights.shape or (base is not None and base.shape != weights.shape):
        raise ValueError(
            f"weights, potential and base must be (n,), got {tuple(weights.shape)}, {tuple(potential.shape)}"
            + ("" if base is None else f" and {tuple(base.shape)}")
        )
    for name, value in (("weights", weights), ("base", base)):
        if value is not None and not bool((value > 0).all()):
            raise ValueError(f"{name} must be positive: relative entropy never revives a particle of weight 0")
    _positive(step=step)
    _not_negative(temperature=temperature)
    log = weights.log() - step * potential
    if temperature and base is not None:
        log = log + step * temperature * base.log()
    return torch.softmax(log / (1 + step * temperature), 0)


def wfr_step(
    positions: Tensor, weights: Tensor, potential: Potential, *, step: float, alpha: float
) -> tuple[Tensor, Tensor]:
    r"""One step of the Wasserstein-Fisher-Rao flow by splitting: positions by transport, then weights by reaction.

    .. math:: \theta_j \leftarrow \theta_j - dt\,\nabla V(\theta_j, \mu), \qquad
              w_j \leftarrow w_j e^{-\alpha\,dt\,(V(\theta_j, \mu) - \bar V)} / \text{mass}

    Args:
        positions: ``(n, d)``.
        weights: ``(n,)``, positive, of sum 1.
        potential: ``potential(at, positions, weights)`` is V(at, mu) at places ``(m, d)``, ``(m,)``, for the mu of
            these particles; differentiable in ``at``.
        step: Dt, positive.
        alpha: At least 0; 0: transport alone.

    Returns:
        New positions and weights.

    Raises:
        ValueError: A number out of its range, or as :func:`kl_proximal_step`.

    Source: Rotskoff 2020, (34), (36), "splitting scheme".
    """
    _positive(step=step)
    _not_negative(alpha=alpha)
    at = positions.detach().requires_grad_()
    with torch.enable_grad():  # mu is held still: a particle feels V, not its own share in it
        (gradient,) = torch.autograd.grad(potential(at, positions.detach(), weights).sum(), at)
    positions = positions - step * gradient
    if not alpha:
        return positions, weights
    return positions, kl_proximal_step(weights, potential(positions, positions, weights), step=alpha * step)


def implicit_euler_step(
    energy: Callable[[Tensor], Tensor],
    positions: Tensor,
    *,
    step: float,
    tolerance: float = 1e-9,
    iterations: int = 200,
) -> Tensor:
    r"""One implicit step of the positions, the proximal point of the energy in W_2.

    .. math:: \theta_{k+1} = \operatorname{argmin}_\theta\;
              E(\theta) + \frac{1}{2\tau n}\sum_i |\theta_i - \theta_{k,i}|^2

    It lowers the energy whatever the step, where an explicit one must stay below 2 over the curvature. The argmin is
    found by L-BFGS with a line search. The coupling that keeps each particle's identity is optimal for small steps.

    Args:
        energy: Maps ``(n, d)`` to a scalar, the energy of the measure with weights 1/n.
        positions: ``(n, d)``.
        step: tau, positive.
        tolerance: On the largest entry of the proximal objective's gradient, times n.
        iterations: At most so many of L-BFGS.

    Returns:
        New positions.

    Raises:
        ValueError: A number out of its range.
        RuntimeError: The tolerance was not met.

    Source: Rotskoff 2020, (16); Jordan, Kinderlehrer, Otto 1998.
    """
    _positive(step=step, tolerance=tolerance)
    n = len(positions)
    theta = positions.detach().clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [theta], max_iter=iterations, tolerance_grad=tolerance, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        with torch.enable_grad():
            # times n, so that the gradient of a particle does not depend on how many there are
            value = n * energy(theta) + (theta - positions.detach()).square().sum() / (2 * step)
            value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(closure)  # type: ignore[no-untyped-call]
    closure()
    assert theta.grad is not None
    error = float(theta.grad.abs().max())
    if not error <= 100 * tolerance:
        raise RuntimeError(
            f"the implicit step of {step:g} is not solved: its gradient is still {error:.1e} after {iterations} "
            f"iterations; take a smaller step, more iterations, or a tolerance above {tolerance:g}"
        )
    return theta.detach()


def _positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, got {value!r}")


def _not_negative(**numbers: float) -> None:
    for name, value in numbers.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
