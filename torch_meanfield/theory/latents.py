"""Data in high dimension with one direction that matters: what a learner can see of a sample.

A sample is ``x = s v / sqrt(d) + sqrt(variance) z``, with ``|v|^2 = d`` and z standard normal in the directions
across v. Its *signal* s, its variance and its label are all that decides how it is learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Latents(NamedTuple):
    """Of N samples, ``(N,)`` each: the coordinate along v, the variance across it, the label."""

    signal: Tensor
    variance: Tensor
    label: Tensor


# Makes them of (N, 2) independent standard normal numbers.
Source = Callable[[Tensor], Latents]


def teacher_student(noise: float = 0.0) -> Source:
    r"""Standard normal inputs, labels :math:`y = v \cdot x / \sqrt d + \sqrt{\text{noise}}\,\epsilon`.

    Raises:
        ValueError: A negative noise (it is a variance).
    """
    _check_variance("noise", noise)

    def source(normal: Tensor) -> Latents:
        signal, rest = normal.unbind(-1)
        return Latents(signal, torch.ones_like(signal), signal + math.sqrt(noise) * rest)

    return source


def gaussian_mixture(variance: float, *, outer: float = 1.0) -> Source:
    r"""Clusters at :math:`\pm v / \sqrt d` and, if ``outer`` is below 1, one at 0.

    .. math:: x = c\,v / \sqrt d + \sqrt\Delta\,z

    With two clusters the label is c; with three it is 1 for the outer ones and -1 for the inner one.

    Args:
        variance: :math:`\Delta` of each coordinate, at least 0.
        outer: :math:`\rho`, the share of the two outer clusters together, in (0, 1].

    Raises:
        ValueError: A number out of its range.

    Source: Mignacco, Krzakala, Urbani, Zdeborová 2020 (arXiv:2006.06098), the two models of the data.
    """
    _check_variance("variance", variance)
    if not 0 < outer <= 1:
        raise ValueError(f"outer must be in (0, 1], the share of the two outer clusters, got {outer!r}")

    def source(normal: Tensor) -> Latents:
        which, along = normal.unbind(-1)
        # beyond this quantile on either side
        threshold = math.sqrt(2) * torch.special.erfinv(torch.tensor(1 - outer, dtype=normal.dtype))
        cluster = torch.where(which.abs() >= threshold, which.sign(), torch.zeros_like(which))
        label = cluster if outer == 1 else 2 * cluster.abs() - 1
        return Latents(cluster + math.sqrt(variance) * along, torch.full_like(along, variance), label)

    return source


def mixture_error(
    overlap: Tensor, norm: Tensor, variance: float, *, outer: float = 1.0, threshold: float = 0.0
) -> Tensor:
    r"""The share of fresh samples of :func:`gaussian_mixture` that a read-out with these overlaps gets wrong.

    Outputs of a cluster are normal with mean c m and variance :math:`\Delta q`. Two clusters are told apart by the
    sign, three by whether :math:`|h|` is above ``threshold``.

    Args:
        overlap, norm: :math:`m = w \cdot v / d` and :math:`q = |w|^2 / d`, of one shape; the result has it.
        variance, outer: As for :func:`gaussian_mixture`.
        threshold: Only for three clusters, at least 0.

    Raises:
        ValueError: A norm that is not positive, or a number out of its range.

    Source: Mignacco, Krzakala, Urbani, Zdeborová 2020, the generalisation error.
    """
    gaussian_mixture(variance, outer=outer)
    if not bool((norm > 0).all()) or not threshold >= 0:
        raise ValueError(f"norm must be positive and threshold at least 0, got {norm.min().item()} and {threshold!r}")
    width = (variance * norm).sqrt()

    def below(value: Tensor) -> Tensor:
        share: Tensor = torch.special.ndtr(value / width)
        return share

    if outer == 1:
        return below(-overlap)
    at = torch.full_like(overlap, threshold)
    return outer * (below(at - overlap) - below(-at - overlap)) + 2 * (1 - outer) * below(-at)


def _check_variance(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is a variance: it must be finite and at least 0, got {value!r}")
