r"""Residual networks as a kinetic equation: what a deep network does to the *law* of its inputs.

A residual network of one neuron, :math:`x_{k+1} = x_k + \Delta t\,\sigma(w x_k + b)\;[+ \sqrt{\Delta t}\,K\xi_k]`, is a
time step of :math:`dX = \sigma(wX + b)\,dt + K\,dW`. With very many inputs, their density g solves

.. math:: \partial_t g + \partial_x\big(\sigma(wx + b)\, g\big) = \tfrac12\,\partial_x^2 (K^2 g),

a transport equation for the ordinary network (K = 0), a Fokker-Planck equation for the stochastic one. To train is then
to choose w, b and K so that g ends as a wanted density. Source: Herty, Trimborn, Visconti 2020 (arXiv:2001.04294), the
mean-field equation, its moments, steady states and Fokker-Planck formulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Field = Callable[[Tensor], Tensor]


class Moments(NamedTuple):
    """E[x] and E[x^2], in the shape of the times."""

    first: Tensor
    second: Tensor


def linear_moments(
    times: Tensor, *, weight: float, bias: float, mean: float, variance: float, noise: float = 0.0
) -> Moments:
    r"""The first two moments of the data on their way through a network with :math:`\sigma(x) = x`, exactly.

    .. math:: \dot m_1 = w m_1 + b, \qquad \dot m_2 = 2 w m_2 + 2 b m_1 + K^2

    For w = -1: :math:`m_1 = b + (m_1(0) - b)\,e^{-t}`, and without bias and noise :math:`m_2 = m_2(0)\,e^{-2t}`.

    Args:
        times: Times (depths times the step), at least 0, any shape.
        weight, bias: w and b.
        mean, variance: Of the data at time 0.
        noise: K, at least 0.

    Raises:
        ValueError: A variance, a noise or a time below 0, or a number that is not finite.

    Example:
        >>> m = linear_moments(torch.tensor([0.0, 1.0]), weight=-1.0, bias=0.0, mean=1.0, variance=1.0)
        >>> m.first.tolist(), m.second.tolist()  # e^-1, 2 e^-2
        ([1.0, 0.36787944117144233], [2.0, 0.2706705664732254])

    Source: Herty, Trimborn, Visconti 2020, the moments for the identity activation.
    """
    _check_numbers(weight=weight, bias=bias, mean=mean)
    _check_numbers(least=0.0, variance=variance, noise=noise)
    t = times.double()
    if not bool(torch.isfinite(t).all() and (t >= 0).all()):
        raise ValueError("times must be finite and at least 0")
    first = mean * torch.exp(weight * t) + bias * _growth(weight, t)
    spread = variance * torch.exp(2 * weight * t) + noise**2 * _growth(2 * weight, t)
    return Moments(first, spread + first.square())


def fit_linear(mean: float, variance: float, noise: float) -> tuple[float, float]:
    r"""The weight and bias whose stochastic network turns *any* data into a Gaussian of this mean and variance.

    .. math:: w = -K^2 / (2v), \qquad b = -w m

    Raises:
        ValueError: A variance or a noise that is not positive, or a mean that is not finite.

    Source: Herty, Trimborn, Visconti 2020, steady states of the Fokker-Planck equation with the identity activation.
    """
    _check_numbers(mean=mean)
    _check_numbers(least=0.0, variance=variance, noise=noise)
    if variance == 0 or noise == 0:
        raise ValueError(f"variance and noise must be positive, got {variance!r} and {noise!r}: noise keeps the width")
    weight = -(noise**2) / (2 * variance)
    return weight, -weight * mean


def steady_state(velocity: Field, noise: float | Field, edges: Tensor) -> Tensor:
    r"""The share of the data in each cell that the stochastic network no longer changes.

    .. math:: g_\infty(x) \propto \frac1{K(x)^2} \exp\int^x \frac{2\,\sigma(wy + b)}{K(y)^2}\,dy

    It exists on the whole line if the exponent falls at both ends; in a box with closed walls, always.

    Args:
        velocity: :math:`x \mapsto \sigma(wx + b)`, element by element.
        noise: K, or a function of x; positive.
        edges: Where the cells begin and end, ``(cells + 1,)``, evenly spaced.

    Returns:
        ``(cells,)``, float64, with sum 1.

    Raises:
        ValueError: Edges that are not evenly spaced and rising, a noise that is not positive, a velocity that is not
            finite or not element-wise.

    Source: Herty, Trimborn, Visconti 2020, steady states of the Fokker-Planck equation.
    """
    drop, diffusion, _ = _cells(velocity, noise, edges)
    exponent = torch.cat([drop.new_zeros(1), drop.cumsum(0)]) - diffusion.log()
    return torch.softmax(exponent, 0)


def fokker_planck(
    velocity: Field, noise: float | Field, edges: Tensor, share: Tensor, times: Tensor, *, max_bytes: int = 1 << 30
) -> Tensor:
    r"""The shares of the data in the cells at later times: finite volumes, exact in time.

    Between cells i and i+1 of width h flows, with :math:`D = K^2 / 2` and :math:`p = h a / D` at the edge,

    .. math:: F = \tfrac1h\left(B(-p)\, D_i g_i - B(p)\, D_{i+1} g_{i+1}\right), \qquad B(p) = p / (e^p - 1),

    so that the discrete :func:`steady_state` stands still to the last digit, whatever the grid. The cells are then the
    states of a Markov chain, and shares at later times come from the exponential of its generator: never negative,
    their sum kept, no time step. The error in space falls with h^2. The walls are closed.

    Args:
        velocity, noise, edges: As for :func:`steady_state`.
        share: Shares at time 0, ``(cells,)``, at least 0.
        times: ``(steps,)``, rising from at least 0. Evenly spaced ones cost one exponential.
        max_bytes: A bound for the memory, about six dense matrices of cells x cells.

    Returns:
        ``(steps, cells)``, float64.

    Raises:
        ValueError: As :func:`steady_state`; shares that are negative or do not fit the edges, times that do not rise;
            cells that would need more memory than ``max_bytes``, with the number that fits.

    Source: Herty, Trimborn, Visconti 2020, the Fokker-Planck equation; Scharfetter and Gummel 1969 for the flux.
    """
    cells = len(edges) - 1
    if 6 * 8 * cells**2 > max_bytes:
        raise ValueError(
            f"edges make {cells} cells, whose matrices need {6 * 8 * cells**2:,} bytes; max_bytes={max_bytes:,} is "
            f"enough for {math.isqrt(max(max_bytes, 0) // 48)} cells"
        )
    drop, diffusion, width = _cells(velocity, noise, edges)
    share, times = share.double(), times.double()
    if share.shape != (cells,) or not bool(torch.isfinite(share).all() and (share >= 0).all()):
        raise ValueError(f"share must be ({cells},), finite and at least 0, got shape {tuple(share.shape)}")
    gaps = torch.cat([times[:1], times.diff()]) if times.dim() == 1 and len(times) else times
    if gaps.dim() != 1 or not len(gaps) or not bool(torch.isfinite(gaps).all() and (gaps >= 0).all()):
        raise ValueError("times must be (steps,), finite, and rise from at least 0")
    generator = _generator(drop, diffusion, width)
    found, known = [], (-1.0, generator)
    for gap in gaps.tolist():
        if not math.isclose(gap, known[0], rel_tol=1e-9, abs_tol=1e-300):
            known = (gap, torch.linalg.matrix_exp(gap * generator))
        share = known[1] @ share
        found.append(share)
    return torch.stack(found)


def _cells(velocity: Field, noise: float | Field, edges: Tensor) -> tuple[Tensor, Tensor, float]:
    """h a / D at the inner edges, D in the cells, and h; checked."""
    edges = edges.double()
    if edges.dim() != 1 or len(edges) < 3:
        raise ValueError(f"edges must be (cells + 1,) with two cells at least, got shape {tuple(edges.shape)}")
    width = float(edges[-1] - edges[0]) / (len(edges) - 1)
    if not width > 0 or not bool((edges.diff() - width).abs().max() <= 1e-6 * width):
        raise ValueError("edges must rise in even steps, as those of torch.linspace do")
    inner, centre = edges[1:-1], (edges[1:] + edges[:-1]) / 2
    amplitude = noise if callable(noise) else (lambda x: torch.full_like(x, noise))
    values = {"velocity": velocity(inner), "noise": amplitude(inner), "noise in the cells": amplitude(centre)}
    for (name, value), like in zip(values.items(), (inner, inner, centre), strict=True):
        if value.shape != like.shape or not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} must be finite and act element by element, got shape {tuple(value.shape)}")
        if name != "velocity" and not bool((value > 0).all()):
            raise ValueError(
                f"{name} must be positive, its least value is {float(value.min())}; a network without noise carries "
                f"its inputs along, and linear_moments or the inputs themselves tell where"
            )
    drop = width * values["velocity"] / (values["noise"].square() / 2)
    return drop, values["noise in the cells"].square() / 2, width


def _generator(drop: Tensor, diffusion: Tensor, width: float) -> Tensor:
    """The rates at which data change their cell, ``(cells, cells)``; columns sum to 0."""
    forth = _bernoulli(-drop) * diffusion[:-1] / width**2
    back = _bernoulli(drop) * diffusion[1:] / width**2
    rates = torch.diag(forth, -1) + torch.diag(back, 1)
    return rates - torch.diag(rates.sum(0))


def _bernoulli(p: Tensor) -> Tensor:
    """p / (e^p - 1), 1 at 0; overflow of e^p leaves 0, as it should."""
    small = p.abs() < 1e-8
    return torch.where(small, 1 - p / 2, p / torch.expm1(torch.where(small, torch.ones_like(p), p)))


def _growth(rate: float, t: Tensor) -> Tensor:
    """The integral of e^(rate s) over s from 0 to t."""
    return torch.expm1(rate * t) / rate if rate else t


def _check_numbers(least: float = -math.inf, **numbers: float) -> None:
    for name, value in numbers.items():
        if not (math.isfinite(value) and value >= least):
            bound = "" if math.isinf(least) else f" and at least {least:g}"
            raise ValueError(f"{name} must be finite{bound}, got {value!r}")
