r"""Quantised activations: how deep a network with N levels can be, and the initialisation that lets it.

A quantised activation jumps, so two nearby inputs part at once (the correlation map has infinite slope at 1) and with
odd activations and no biases correlations decay to 0, at the rate of the map's slope there. A signal survives
:math:`\xi = -1 / \log \chi_0` layers. The slope is one less the relative error of the quantiser on a Gaussian, so the
best step is that of the best uniform quantiser, and :math:`\xi` grows like :math:`N^{1.82}`.

Source: Blumenfeld, Gilboa, Soudry 2019 (arXiv:1906.00771), sections 4 and 5.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

_GOLDEN = (math.sqrt(5) - 1) / 2


class QuantisedEdge(NamedTuple):
    """The initialisation that carries signals deepest, for pre-activations of variance 1.

    Attributes:
        step: Distance between levels.
        sigma_w: Deviation of the weights (times the root of the width) that keeps the variance at 1.
        depth_scale: Xi, in layers.
    """

    step: float
    sigma_w: float
    depth_scale: float


class Quantised(nn.Module):
    """An activation of ``levels`` equidistant values around 0, saturating; with an even number 0 is a jump.

    Backwards it is the identity up to half a step beyond the outermost levels, and 0 outside (the straight-through
    estimator), so that networks can be trained.

    Args:
        levels: N, at least 2 (2: sign times half a step).
        step: Distance between levels, positive.

    Raises:
        ValueError: Fewer than two levels, or a step that is not positive.

    Source: Blumenfeld et al. 2019, eq. (3); Hubara et al. 2017 for the estimator.

    Example:
        >>> Quantised(3, 1.0)(torch.tensor([-2.0, -0.4, 0.4, 0.7])).tolist()
        [-1.0, -0.0, 0.0, 1.0]
    """

    def __init__(self, levels: int, step: float) -> None:
        super().__init__()
        _check_levels(levels)
        if not (math.isfinite(step) and step > 0):
            raise ValueError(f"step must be positive and finite, got {step!r}")
        self.levels, self.step = levels, step

    def forward(self, x: Tensor) -> Tensor:
        """The nearest level, in the shape of ``x``."""
        return cast(Tensor, _StraightThrough.apply(x, self.levels, self.step))

    def extra_repr(self) -> str:
        """Levels and step."""
        return f"{self.levels}, step={self.step:g}"


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int, step: float) -> Tensor:
        half = (levels - 1) / 2
        ctx.save_for_backward(x.abs() <= (half + 0.5) * step)
        index = torch.round(x / step) if levels % 2 else torch.floor(x / step) + 0.5
        return index.clamp(-half, half) * step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None


def quantised_moments(levels: int, step: float) -> tuple[float, float]:
    r"""E[phi(z)^2] and E[z phi(z)] of :class:`Quantised` for z ~ N(0, 1), in closed form.

    With jumps at :math:`t_i`, :math:`E[z\phi] = \sum_i \text{step}\; n(t_i)`, n the normal density.

    Raises:
        ValueError: Fewer than two levels, or a step that is not positive.

    Example:
        >>> [round(v, 4) for v in quantised_moments(2, 2.0)]  # sign: 1 and sqrt(2 / pi)
        [1.0, 0.7979]
    """
    _check_levels(levels)
    if not (math.isfinite(step) and step > 0):
        raise ValueError(f"step must be positive and finite, got {step!r}")
    half = (levels - 1) / 2
    values = (torch.arange(levels, dtype=torch.float64) - half) * step
    jumps = (values[1:] + values[:-1]) / 2
    below = torch.cat([torch.zeros(1), torch.special.ndtr(jumps), torch.ones(1)]).double()
    first = step * torch.exp(-jumps.square() / 2).sum() / math.sqrt(2 * math.pi)
    return (values.square() * below.diff()).sum().item(), first.item()


def quantised_depth_scale(levels: int, step: float) -> float:
    r"""Depth over which correlations decay, :math:`\xi = -1 / \log\left(E[z\phi]^2 / E[\phi^2]\right)`, in layers.

    Args:
        levels: N.
        step: Distance between levels, in deviations of the pre-activations.

    Raises:
        ValueError: Fewer than two levels, or a step that is not positive.

    Source: Blumenfeld et al. 2019, section 4: the slope of the correlation map at its fixed point 0.

    Example:
        >>> round(quantised_depth_scale(2, 1.0), 3)  # sign: -1 / log(2 / pi)
        2.214
    """
    second, first = quantised_moments(levels, step)
    slope = first**2 / second
    return -1 / math.log(slope) if 0 < slope < 1 else (0.0 if slope <= 0 else math.inf)


def quantised_edge(levels: int) -> QuantisedEdge:
    """The step and the sigma_w with which a network of N levels carries signals deepest.

    Args:
        levels: N, at least 2. At 2 every step is as good, and 1 is returned.

    Raises:
        ValueError: Fewer than two levels.

    Source: Blumenfeld et al. 2019, section 5.2; the depth grows as N^1.82.

    Example:
        >>> round(quantised_edge(16).depth_scale)
        86
    """
    _check_levels(levels)
    low, high = math.log(1e-3), math.log(4.0)
    if levels == 2:
        low = high = 0.0
    while high - low > 1e-9:  # golden section: the depth scale has one maximum in the logarithm of the step
        a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if quantised_depth_scale(levels, math.exp(a)) > quantised_depth_scale(levels, math.exp(b)):
            high = b
        else:
            low = a
    step = math.exp((low + high) / 2)
    return QuantisedEdge(step, quantised_moments(levels, step)[0] ** -0.5, quantised_depth_scale(levels, step))


def _check_levels(levels: int) -> None:
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
        raise ValueError(f"levels must be an integer of at least 2, got {levels!r}")
