r"""Dynamical mean-field theory of gradient descent and SGD on a fixed set of samples in high dimension.

A linear read-out :math:`h = w \cdot x / \sqrt d` learns n = alpha d samples, each seen many times, by

.. math:: w_{t+1} = w_t - \eta\Big(\lambda w_t + \frac1b \sum_\mu s_\mu(t)\,\ell'(h_\mu, y_\mu)\,
          \frac{x_\mu}{\sqrt d}\Big), \qquad s_\mu(t) \in \{0, 1\},\; E\,s = b.

As :math:`d \to \infty` one sample's output becomes a process with memory, driven by Gaussian noise whose covariance,
and whose memory, are averages over that same process. In discrete time averages up to t fix the process at t + 1, so
that one sweep solves the equations; nothing is iterated. A small step gives the (stochastic) gradient flow of the
source: Mignacco, Krzakala, Urbani, Zdeborová 2020 (arXiv:2006.06098).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torch_meanfield.theory.fluctuations import gaussian_particles
from torch_meanfield.theory.latents import Source

Loss = Callable[[Tensor, Tensor], Tensor]


class Dynamics(NamedTuple):
    """What one run of training does, at ``steps + 1`` times; float64.

    Attributes:
        overlap: ``w . v / d``.
        correlation: ``w(t) . w(t') / d``, ``(steps + 1, steps + 1)``.
        loss: The mean loss of the training samples.
    """

    overlap: Tensor
    correlation: Tensor
    loss: Tensor

    @property
    def norm(self) -> Tensor:
        """``|w|^2 / d``."""
        return self.correlation.diagonal()


def dynamical_mean_field(
    loss: Loss,
    source: Source,
    *,
    ratio: float,
    rate: float,
    steps: int,
    decay: float = 0.0,
    overlap: float = 0.0,
    norm: float = 1.0,
    batch: float = 1.0,
    persistence: float | None = None,
    paths: int = 2**12,
    seed: int = 0,
    max_bytes: int = 2 << 30,
) -> Dynamics:
    r"""Training predicted without a network.

    With :math:`g_t = \frac{s(t)}b \ell'(h_t, y)`, c the signal and :math:`\Delta` the variance of a sample,
    :math:`\chi` a Gaussian process of covariance C (the correlation of w across v), and E over samples, masks and
    :math:`\chi`,

    .. math::
        h_t &= c\,m_t + \sqrt\Delta\,\chi_t - \eta\Delta \sum_{s<t} R_{ts}\, g_s, \qquad
        m_{t+1} = (1 - \eta\lambda)\,m_t - \eta\alpha\,E[c\,g_t] \\
        \Gamma_{ts} &= \alpha\,E[\Delta\,\partial g_t / \partial h_s], \qquad M_{ts} = \alpha\,E[\Delta\,g_t g_s] \\
        R_{t+1,s} &= (1 - \eta\lambda) R_{ts} - \eta \sum_{r} \Gamma_{tr} R_{rs} + \delta_{ts}, \qquad
        C = C_{00}\,a a^\top + \eta^2 R M R^\top

    with a the solution of R's equation without the last term, :math:`a_0 = 1`. Averages are over antithetic, evenly
    spread paths whose covariance is made exactly that of the law: for the square loss and Gaussian data the result is
    exact.

    Args:
        loss: ``loss(h, y)``, element by element, differentiable by torch; its derivative must not jump.
        source: Makes samples, for instance :func:`~torch_meanfield.theory.latents.gaussian_mixture`.
        ratio: :math:`\alpha = n / d`.
        rate: :math:`\eta`; the time of the gradient flow is ``rate`` times the step.
        steps: Number of steps.
        decay: :math:`\lambda`, at least 0.
        overlap, norm: ``w . v / d`` and ``|w|^2 / d`` at the start.
        batch: b, the share of the samples in a batch, in (0, 1].
        persistence: ``None``: a fresh batch in every step (SGD). Otherwise :math:`\tau`, the mean time for which a
            sample stays out; it enters with probability :math:`\eta/\tau` in a step (persistent SGD, which has a
            limit of small steps).
        paths: Number of paths, a power of 2.
        seed: Of the paths.
        max_bytes: A bound for the memory, 8 steps^2 paths bytes in the main.

    Raises:
        ValueError: A number out of its range (so a norm below overlap^2, a negative variance); a loss that is not
            element-wise, or piecewise linear; paths that would need more memory than ``max_bytes``, with the number
            that fits.
        RuntimeError: Training that diverges, with the step at which it does.

    Example:
        >>> from torch_meanfield.theory.latents import teacher_student
        >>> found = dynamical_mean_field(lambda h, y: (h - y) ** 2 / 2, teacher_student(), ratio=3.0, rate=0.1, steps=1,
        ...                              decay=0.5, overlap=0.2, paths=64)
        >>> round(found.overlap[1].item(), 6)  # 0.2 - 0.1 (0.5 * 0.2 - 3 * 0.8)
        0.43

    Source: Mignacco, Krzakala, Urbani, Zdeborová 2020, the effective process and its self-consistent equations, here
    for finite steps.
    """
    _check(ratio, rate, steps, decay, overlap, norm, batch, persistence, paths, max_bytes)
    normal = _paths(paths, 2 * steps + 3, seed)
    c, delta, y = _samples(source, normal[:, :2])
    _check_loss(loss, y)
    noise, masks = normal[:, 2 : steps + 3], _masks(normal[:, steps + 3 :], batch, rate, persistence) / batch
    keep = 1 - rate * decay
    m, a = normal.new_zeros(steps + 1), normal.new_zeros(steps + 1)
    losses, gram = torch.zeros_like(m), normal.new_zeros(steps + 1, steps + 1)
    response, memory, correlation, factor = (torch.zeros_like(gram) for _ in range(4))
    g, slopes = normal.new_zeros(steps, paths), normal.new_zeros(steps, steps, paths)
    m[0], a[0], correlation[0, 0] = overlap, 1.0, max(norm - overlap**2, 0.0)
    for t in range(steps + 1):
        factor[t, : t + 1] = _cholesky_row(factor, correlation[t, : t + 1])
        chi = noise[:, : t + 1] @ factor[t, : t + 1]
        h = c * m[t] + delta.sqrt() * chi - rate * delta * (response[t, :t] @ g[:t])
        value, first, second = _derivatives(loss, h, y)
        losses[t] = value.mean()
        if not bool(torch.isfinite(losses[t])):
            raise RuntimeError(f"training diverges at step {t}; a smaller rate than {rate!r} may keep it bounded")
        if t == steps:
            break
        g[t] = masks[:, t] * first
        # how g_t follows a push on h_s: directly, and through what the push did to earlier gradients
        slopes[t, :t] = -rate * delta * torch.tensordot(response[t, :t], slopes[:t, :t], 1)
        slopes[t, t] = 1.0
        slopes[t, : t + 1] *= masks[:, t] * second
        memory[t, : t + 1] = ratio * (slopes[t, : t + 1] @ delta) / paths
        gram[t, : t + 1] = gram[: t + 1, t] = ratio * (g[: t + 1] @ (delta * g[t])) / paths
        m[t + 1] = keep * m[t] - rate * ratio * (c @ g[t]) / paths
        response[t + 1] = keep * response[t] - rate * memory[t] @ response
        response[t + 1, t] += 1.0
        a[t + 1] = keep * a[t] - rate * memory[t] @ a
        row = a[t + 1] * a * correlation[0, 0] + rate**2 * (response @ (gram @ response[t + 1]))
        correlation[t + 1, : t + 2] = correlation[: t + 2, t + 1] = row[: t + 2]
    return Dynamics(m, correlation + m[:, None] * m, losses)


def _paths(count: int, dim: int, seed: int) -> Tensor:
    """Standard normal numbers in opposite pairs, as even as Sobol's and with covariance exactly 1."""
    half = gaussian_particles(count // 2, dim, seed=seed)
    values, vectors = torch.linalg.eigh(half.T @ half / len(half))
    half = half @ (vectors * values.rsqrt()) @ vectors.T
    return torch.cat([half, -half])


def _masks(normal: Tensor, batch: float, rate: float, persistence: float | None) -> Tensor:
    """Whether a sample is in the batch, ``(paths, steps)``."""
    uniform: Tensor = torch.special.ndtr(normal)
    if persistence is None or batch == 1:
        return (uniform <= batch).to(normal.dtype)
    enter, leave = rate / persistence, rate / persistence * (1 - batch) / batch
    state, found = uniform[:, 0] <= batch, []
    for column in uniform[:, 1:].unbind(1):
        found.append(state)
        state = torch.where(state, column > leave, column <= enter)
    return torch.stack([*found, state], 1).to(normal.dtype)


def _samples(source: Source, normal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the source makes, checked."""
    signal, variance, label = (part.to(normal.dtype) for part in source(normal))
    if not signal.shape == variance.shape == label.shape == normal.shape[:1]:
        raise ValueError(
            f"source must make (N,) signals, variances and labels of (N, 2) numbers, got {tuple(signal.shape)}, "
            f"{tuple(variance.shape)} and {tuple(label.shape)} for N = {len(normal)}"
        )
    if not bool((variance >= 0).all()):
        raise ValueError(f"source makes the variance {variance.min().item():.3g}; variances must be at least 0")
    return signal, variance, label


def _check_loss(loss: Loss, y: Tensor) -> None:
    """A kink of the loss would be a delta function of memory, which sampled paths do not see."""
    labels = y[:32].repeat_interleave(145)
    probe = torch.linspace(-7.3, 7.1, 145, dtype=y.dtype).repeat(len(labels) // 145)
    _, first, second = _derivatives(loss, probe, labels)
    jumps = first.reshape(-1, 145)
    if float(second.abs().max()) == 0 and float((jumps.amax(1) - jumps.amin(1)).max()) > 0:
        raise ValueError("loss is piecewise linear: its derivative jumps; smooth it, as softplus(beta * z) / beta does")


def _derivatives(loss: Loss, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each path and its first two derivatives by h."""
    with torch.enable_grad():
        at = h.detach().requires_grad_()
        value = loss(at, y)
        if value.shape != h.shape:
            raise ValueError(f"loss must act element by element, got shape {tuple(value.shape)} of {tuple(h.shape)}")
        (first,) = torch.autograd.grad(value.sum(), at, create_graph=True)
        second = torch.zeros_like(h)
        if first.requires_grad:
            (second,) = torch.autograd.grad(first.sum(), at)
    return value.detach(), first.detach(), second


def _cholesky_row(factor: Tensor, row: Tensor) -> Tensor:
    """The next row of the factor of a covariance that may be singular: training that stands still repeats itself."""
    t, found = len(row) - 1, torch.zeros_like(row)
    for j in range(t):
        if factor[j, j] > 0:
            found[j] = (row[j] - factor[j, :j] @ found[:j]) / factor[j, j]
    rest = row[t] - found.square().sum()
    # Smaller innovations are mostly rounding, and later rows are divided by them: at 1e-12 errors grow to 1e-7 in 30
    # steps, here they stay at 2e-10.
    found[t] = rest.sqrt() if rest > 1e-8 * row[t] else 0.0
    return found


def _check(
    ratio: float,
    rate: float,
    steps: int,
    decay: float,
    overlap: float,
    norm: float,
    batch: float,
    persistence: float | None,
    paths: int,
    max_bytes: int,
) -> None:
    for name, value, positive in (("ratio", ratio, True), ("rate", rate, True), ("decay", decay, False)):
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            raise ValueError(f"{name} must be finite and {'positive' if positive else 'at least 0'}, got {value!r}")
    for name, count, least in (("steps", steps, 0), ("paths", paths, 2)):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ValueError(f"{name} must be an integer, at least {least}, got {count!r}")
    if not (math.isfinite(overlap) and math.isfinite(norm)) or norm < overlap**2:
        raise ValueError(
            f"norm must be at least overlap^2 = {overlap**2:g}, got {norm!r}: the rest is the variance of w across v"
        )
    if not 0 < batch <= 1:
        raise ValueError(f"batch must be a share in (0, 1], got {batch!r}")
    if persistence is not None and not persistence >= rate * max(1.0, (1 - batch) / batch):
        raise ValueError(
            f"persistence must be at least {rate * max(1.0, (1 - batch) / batch):g} for this rate and batch (or None), "
            f"so that probabilities stay below 1, got {persistence!r}"
        )
    dim = 2 * steps + 3
    if paths & (paths - 1) or paths < 2 * dim:
        fits = 1 << max(paths, 2 * dim).bit_length()
        raise ValueError(
            f"paths must be a power of 2 and at least {2 * dim} for {steps} steps, got {paths}; take {fits}"
        )
    need = 8 * paths * (steps**2 + 3 * dim)
    if need > max_bytes:
        fits = 1 << (max(max_bytes, 1) // (8 * (steps**2 + 3 * dim))).bit_length() >> 1
        raise ValueError(
            f"{paths} paths of {steps} steps need {need:,} bytes; max_bytes={max_bytes:,} is enough for {fits}"
        )
