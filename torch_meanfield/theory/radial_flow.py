r"""The distributional dynamics of the isotropic Gaussians: gradient flow of the law of radii, without and with noise.

The risk is :math:`R(\rho) = E(y - f)^2`, a particle's potential :math:`\psi(r) = E[(f(x) - y)\,q(r|x|)]`. Stochastic
gradient descent :math:`w_i \leftarrow w_i + 2\epsilon\,(y - f)\,\nabla\sigma` follows, in the time that adds up the
:math:`\epsilon`,

.. math:: \partial_t\rho = 2\,\nabla\cdot\left(\rho\,\nabla(\psi + \tfrac\lambda2 r^2)\right) + 2T\,\nabla^2\rho,

in steps of which each particle decays by :math:`2\epsilon\lambda w` and is given noise of variance :math:`4\epsilon T`
(``MeanFieldLangevin`` with ``lr = 2 * eps`` and ``weight_decay`` lambda, on half of the risk). It descends the free
energy

.. math:: F(\rho) = \tfrac12 R(\rho) + \tfrac\lambda2 \int |w|^2 d\rho + T \int \log\rho\; d\rho.

Source: Mei, Montanari, Nguyen 2018 (arXiv:1804.06561), the distributional dynamics of SGD and of noisy SGD, and its
reduction to radii; ``T`` is their 1 / beta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_meanfield.theory.radial import RadialProblem


@dataclass(frozen=True, eq=False)
class RadialFlow:
    """A solution at the times of its steps.

    Attributes:
        risk: E(y - f)^2; float64 ``(steps + 1,)``.
        energy: Free energy, ``(steps + 1,)``; without noise half of the risk.
        radii: Of equally likely particles at the end, or the centres of the cells, ``(J,)``.
        weights: What each holds of the law, ``(J,)``.
    """

    risk: Tensor
    energy: Tensor
    radii: Tensor
    weights: Tensor


def radial_flow(problem: RadialProblem, radii: Tensor, *, duration: float, steps: int) -> RadialFlow:
    r"""The noiseless dynamics by characteristics: radii move, :math:`\dot r = -2\psi'(r)`; Runge and Kutta's rule.

    Args:
        problem: Data and unit.
        radii: Equally likely radii at the start, ``(J,)``, above 0, such as ``problem.gaussian_radii(400, 0.8)``.
        duration: Time, not negative.
        steps: Number of steps, at least 1.

    Raises:
        ValueError: A number out of its range, or radii that are not a list of positive numbers.

    Source: Mei, Montanari, Nguyen 2018, the dynamics reduced to radii.

    Example:
        >>> problem = RadialProblem(dim=40, delta=0.8)
        >>> flow = radial_flow(problem, problem.gaussian_radii(100, 0.8), duration=20.0, steps=200)
        >>> bool((flow.risk.diff() < 0).all())
        True
    """
    r = _checked(radii, duration, steps)
    lengths, weights, labels = problem.inputs()
    h = duration / steps

    def output(at: Tensor) -> Tensor:
        return problem.average(at * lengths[:, None]).mean(1)

    def velocity(at: Tensor) -> Tensor:
        z = at * lengths[:, None]
        residual = problem.average(z).mean(1) - labels
        return -2 * ((weights * lengths * residual) @ problem.slope(z))

    risks = [(weights * (output(r) - labels).square()).sum()]
    for _ in range(steps):
        k1 = velocity(r)
        k2 = velocity(r + h / 2 * k1)
        k3 = velocity(r + h / 2 * k2)
        r = (r + h / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(r + h * k3))).abs()
        risks.append((weights * (output(r) - labels).square()).sum())
    risk = torch.stack(risks)
    return RadialFlow(risk, risk / 2, r, torch.full_like(r, 1 / len(r)))


def radial_fokker_planck(
    problem: RadialProblem,
    law: Tensor,
    *,
    largest: float,
    temperature: float,
    decay: float,
    duration: float,
    steps: int,
) -> RadialFlow:
    r"""The dynamics with noise, on a grid of radii: finite volumes, implicit in time for the potential of each step.

    In the radius the density p of the law sees the potential :math:`\psi + \lambda r^2 / 2 - T (d - 1)\log r`. Fluxes
    after Scharfetter and Gummel 1969 vanish where p is of the Gibbs form, so the stationary state is

    .. math:: p(r) \propto r^{d - 1} \exp\left(-\left(\psi(r) + \tfrac\lambda2 r^2\right) / T\right)

    on the grid to rounding; mass is kept and p stays positive at any time step.

    Args:
        problem: Data and unit, of finite dimension.
        law: Shares of the cells at the start, ``(J,)``, not negative, of sum 1: radii from 0 to ``largest``, evenly.
        largest: The upper end of the grid, a wall.
        temperature: T, above 0.
        decay: lambda, not negative.
        duration: Time.
        steps: Number of steps, at least 1.

    Raises:
        ValueError: A number out of its range, an infinite dimension, or a law that is none.

    Source: Mei, Montanari, Nguyen 2018, the distributional dynamics of noisy SGD.
    """
    if problem.dim is None:
        raise ValueError("noise has a radius that grows with the dimension: dim must be finite, got None")
    p = _checked(law, duration, steps, shares=True)
    for name, value, low in (
        ("largest", largest, "above"),
        ("temperature", temperature, "above"),
        ("decay", decay, "at"),
    ):
        if not math.isfinite(value) or value < 0 or (low == "above" and value == 0):
            raise ValueError(
                f"{name} must be finite and {'above 0' if low == 'above' else 'at least 0'}, got {value!r}"
            )
    lengths, weights, labels = problem.inputs()
    width = largest / len(p)
    r = (torch.arange(len(p), dtype=torch.float64) + 0.5) * width
    values = problem.average(r * lengths[:, None])  # (S, J)
    outside = decay * r.square() / 2 - temperature * (problem.dim - 1) * r.log()
    sphere = math.log(2) + problem.dim / 2 * math.log(math.pi) - math.lgamma(problem.dim / 2)
    risks, energies = [], []
    for step in range(steps + 1):
        residual = values @ p - labels
        risks.append((weights * residual.square()).sum())
        entropy = torch.special.xlogy(p, p).sum() - math.log(width) - sphere
        energies.append(risks[-1] / 2 + (outside * p).sum() + temperature * entropy)
        if step < steps:
            potential = (weights * residual) @ values + outside
            p = _implicit_step(p, potential / temperature, 2 * temperature * duration / steps / width**2)
    return RadialFlow(torch.stack(risks), torch.stack(energies), r, p)


def _implicit_step(p: Tensor, potential: Tensor, courant: float) -> Tensor:
    """One step of div(exp(-u) grad(exp(u) p)) in cells, backward in time."""
    forward, backward = (courant * _bernoulli(sign * potential.diff()) for sign in (1, -1))
    leaving = torch.zeros_like(p)
    leaving[:-1] += forward
    leaving[1:] += backward
    matrix = torch.diag(1 + leaving) - torch.diag(forward, -1) - torch.diag(backward, 1)
    solved: Tensor = torch.linalg.solve(matrix, p)
    return solved


def _bernoulli(x: Tensor) -> Tensor:
    """x / (e^x - 1)."""
    small = x.abs() < 1e-5
    safe = torch.where(small, torch.ones_like(x), x)
    return torch.where(small, 1 - x / 2, safe / torch.expm1(safe))


def _checked(values: Tensor, duration: float, steps: int, shares: bool = False) -> Tensor:
    name = "law" if shares else "radii"
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.dim() != 1 or len(values) < 2 - (not shares) or not bool(values.isfinite().all()):
        raise ValueError(f"{name} must be a list of finite numbers, got shape {tuple(values.shape)}")
    if shares and (bool((values < 0).any()) or abs(float(values.sum()) - 1) > 1e-9):
        raise ValueError(f"law must hold shares, none below 0 and of sum 1; their sum is {float(values.sum()):.6g}")
    if not shares and not bool((values > 0).all()):
        raise ValueError(f"radii must be above 0, the smallest is {float(values.min()):.6g}")
    if not (math.isfinite(duration) and duration >= 0):
        raise ValueError(f"duration must be finite and not negative, got {duration!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    return values
