r"""Fixed points of the signal maps, their depth scales, the phase, and the edge of chaos.

Source: Poole et al. 2016 (arXiv:1606.05340); Schoenholz et al. 2017 (arXiv:1611.01232), eqs. (8) and (9);
Hayou et al. 2018 (arXiv:1805.08266), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from torch_meanfield.theory.activation import Activation, derivative, elementwise, name_of, value_and_derivative
from torch_meanfield.theory.gaussian import broadcast, expect, expect_pair, normal_rule
from torch_meanfield.theory.signal import Number, checked, second_moment

# Lengths beyond these count as infinite and as 0: at SMALL the maps are linear to rounding, and a ReLU's are at any.
LARGE, SMALL = 1e12, 1e-12
_CRITICAL = 1e-6  # |chi_1 - 1| below this is the critical phase
_CHUNK = 64  # settings whose two-dimensional integrals are held at once: 2 MB in a tensor, which stays in cache


@dataclass(frozen=True, eq=False)
class Phase:
    r"""What the signal maps do in the limit of depth. All float64, of the common shape of the settings.

    Attributes:
        q_star: Fixed point of the length map; ``inf`` if lengths grow without bound, 0 if they vanish.
        c_star: Stable fixed point of the correlation map; 1 in the ordered phase.
        chi_1: :math:`\sigma_w^2 E[\phi'(\sqrt{q^*} z)^2]`: slope of the correlation map at c = 1, and what a layer
            multiplies squared gradient norms with.
        xi_q, xi_c: Depths (in layers) over which lengths and correlations approach their fixed points,
            :math:`|q^l - q^*| \sim e^{-l / \xi_q}`; ``inf`` where the approach is not exponential.
    """

    q_star: Tensor
    c_star: Tensor
    chi_1: Tensor
    xi_q: Tensor
    xi_c: Tensor

    @property
    def name(self) -> str:
        """``"ordered"``, ``"critical"`` or ``"chaotic"``; of a single setting only."""
        if self.chi_1.numel() != 1:
            raise ValueError(f"a name is for one setting, here are {self.chi_1.numel()}: compare chi_1 with 1")
        if abs(self.chi_1.item() - 1) < _CRITICAL:
            return "critical"
        return "ordered" if self.chi_1.item() < 1 else "chaotic"


class Critical(NamedTuple):
    """A point on the edge of chaos: standard deviations, and the length that is kept there (0-d float64 tensors)."""

    sigma_w: Tensor
    sigma_b: Tensor
    q_star: Tensor


def phase(activation: Activation, sigma_w: Number, sigma_b: Number = 0.0, *, q: Number = 1.0) -> Phase:
    r"""Fixed points, chi_1 and depth scales of a network at initialisation; of a whole grid of them at once.

    .. math:: \xi_c^{-1} = -\log\left(\sigma_w^2 E[\phi'(u_1^*)\phi'(u_2^*)]\right), \qquad
              \xi_q^{-1} = -\log \mathcal V'(q^*)

    Args:
        activation: Any element-wise callable.
        sigma_w, sigma_b: Standard deviations of weights (times the root of the width) and biases; they broadcast, so
            that ``phase(torch.tanh, w[:, None], b)`` is a phase diagram.
        q: The length from which the recurrence starts. It matters where there are several fixed points, or (ReLU at
            its critical point) any length is one.

    Returns:
        See :class:`Phase`; not differentiable.

    Raises:
        ValueError: A negative deviation or length, or an activation that is not element-wise.

    Source: Schoenholz et al. 2017, eqs. (8), (9); :math:`\mathcal V'` is taken as
        :math:`\sigma_w^2 E[\phi \phi' z] / \sqrt{q}`, which needs no second derivative.

    Example:
        >>> phase(torch.tanh, 1.0, 0.3).name, phase(torch.tanh, 2.0, 0.3).name
        ('ordered', 'chaotic')
    """
    phi = elementwise(activation)
    settings = broadcast(*checked(sigma_w=sigma_w, sigma_b=sigma_b, q=q))
    flat = [t.detach().reshape(-1) for t in settings]
    starts = range(0, max(1, len(flat[0])), _CHUNK)
    parts = [_phase(phi, *(t[start : start + _CHUNK] for t in flat)) for start in starts]
    shape = settings[0].shape
    return Phase(*(torch.cat([getattr(p, f.name) for p in parts]).reshape(shape) for f in fields(Phase)))


def critical(activation: Activation, sigma_b: Number = 0.0, *, q: float = 1.0) -> Critical:
    r"""The edge of chaos: the sigma_w at which chi_1 is 1, for a given sigma_b.

    Both conditions are solved along the length: :math:`\sigma_w^2 = 1 / E[\phi'(\sqrt q z)^2]` makes chi_1 one, and
    the length is a fixed point where

    .. math:: q - \frac{E[\phi(\sqrt q z)^2]}{E[\phi'(\sqrt q z)^2]} = \sigma_b^2.

    Args:
        activation: Any element-wise callable.
        sigma_b: Standard deviation of the biases, one number; the result is differentiable in it.
        q: The length to answer with where every length is kept (ReLU).

    Raises:
        ValueError: A negative deviation, an activation that is not element-wise, or one without an edge of chaos at
            this ``sigma_b`` (a ReLU has one at 0 only).

    The length found is a fixed point, not always a stable one: a GELU network leaves it, downwards or upwards, since
    its length map is steeper than 1 there (``phase(..., q=...)`` tells where the recurrence ends).

    Source: Hayou et al. 2018, Algorithm 1.

    Example:
        >>> round(critical(torch.relu).sigma_w.item() ** 2, 6)
        2.0
    """
    phi = elementwise(activation)
    b, given = checked(sigma_b=sigma_b, q=q)
    if b.numel() != 1 or given.numel() != 1:
        raise ValueError(f"sigma_b and q must be single numbers, got shapes {tuple(b.shape)} and {tuple(given.shape)}")
    b, given = b.reshape(()), given.reshape(())

    def excess(v: Tensor) -> Tensor:
        return (v - second_moment(phi, v) / squared_slope(phi, v)) / v

    grid = torch.logspace(-12, 6, 181, dtype=torch.float64)
    with torch.no_grad():
        ahead = excess(grid) - b.square() / grid
        homogeneous = bool((excess(grid).abs() < 1e-9).all())
    if homogeneous and bool(b == 0):
        length = given
    elif bool(b == 0) and abs(float(ahead[0])) < 1e-9:
        length = torch.zeros_like(b)  # smooth and odd at 0: the edge is reached as lengths vanish
    else:
        crossing = ((ahead[:-1] < 0) & (ahead[1:] >= 0)).nonzero().flatten()
        if homogeneous or len(crossing) == 0:
            raise ValueError(
                f"{name_of(activation)} has no edge of chaos at sigma_b={b.item():g}"
                + (" (its lengths scale: it has one at sigma_b=0 only)" if homogeneous else "; try another sigma_b")
            )
        k = int(crossing[0])
        with torch.no_grad():
            length = _crossing(lambda v: excess(v) - b.square() / v, grid[k], grid[k + 1])
        if b.requires_grad:  # one Newton step carries the gradient (implicit function theorem)
            v = length.detach().requires_grad_()
            (slope,) = torch.autograd.grad(v * excess(v), v)
            length = length - (length * excess(length) - b.square()) / slope
    return Critical(squared_slope(phi, length).rsqrt(), b, length)


def squared_slope(phi: Activation, q: Tensor) -> Tensor:
    """E[phi'(u)^2] for u ~ N(0, q); a layer of sigma_w multiplies squared gradients with sigma_w^2 times this."""
    return expect(lambda u: derivative(phi, u).square(), q)


def _phase(phi: Activation, w: Tensor, b: Tensor, q: Tensor) -> Phase:
    w2, b2 = w.square(), b.square()
    star = length_fixed_point(phi, w2, b2, q)
    at = star.clamp(SMALL, LARGE)
    chi_1 = w2 * squared_slope(phi, at)
    c_star, slope = _correlation_fixed_point(phi, w2, b2, at, chi_1)
    return Phase(star, c_star, chi_1, _depth_scale(_length_slope(phi, w2, at), star.isinf()), _depth_scale(slope))


def length_fixed_point(phi: Activation, w2: Tensor, b2: Tensor, q: Tensor) -> Tensor:
    """The fixed point that the length map reaches from ``q``: bracketed by doubling or halving.

    Right for length maps that increase, as those of activations whose size grows with that of their input.
    """

    def growth(v: Tensor) -> Tensor:
        return w2 * second_moment(phi, v) + b2 - v

    start = q.clamp(SMALL, LARGE)
    first = growth(start)
    kept = first.abs() <= 1e-12 * start
    up = first > 0
    near, far = start.clone(), start.clone()
    seeking = ~kept
    for _ in range(81):
        far = torch.where(seeking, torch.where(up, far * 2, far / 2), far)
        seeking = seeking & ((growth(far) > 0) == up) & (far < LARGE) & (far > SMALL)
        if not bool(seeking.any()):
            break
        near = torch.where(seeking, far, near)
    low, high = torch.minimum(near, far), torch.maximum(near, far)
    found = _crossing(lambda v: -growth(v), low, high)
    found = torch.where(far >= LARGE, torch.inf, torch.where(far <= SMALL, 0.0, found))
    return torch.where(kept, start, found)


def _crossing(f: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Where ``f`` passes from below 0 at ``low`` to above at ``high``: regula falsi, Illinois variant.

    Each entry has its bracket. The side that stays twice in a row counts half, which makes it superlinear.
    """
    at_low, at_high = f(low), f(high)
    side = torch.zeros_like(low)
    middle = low
    for _ in range(100):
        gap = at_high - at_low
        guess = torch.where(gap > 0, low - at_low * (high - low) / gap, (low + high) / 2)
        moved, middle = (guess - middle).abs() > 1e-15 * guess.abs(), guess
        value = f(middle)
        below = value < 0
        if not bool((moved & (value != 0)).any()):
            break
        at_high = torch.where(below & (side == -1), at_high / 2, torch.where(below, at_high, value))
        at_low = torch.where(~below & (side == 1), at_low / 2, torch.where(below, value, at_low))
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        side = torch.where(below, -1.0, 1.0)
    return middle


def _length_slope(phi: Activation, w2: Tensor, q: Tensor) -> Tensor:
    z, weight = normal_rule()
    value, slope = value_and_derivative(phi, q.sqrt()[..., None] * z)
    return w2 * ((value * slope * z) @ weight) / q.sqrt()


def _correlation_fixed_point(
    phi: Activation, w2: Tensor, b2: Tensor, q: Tensor, chi_1: Tensor
) -> tuple[Tensor, Tensor]:
    """c* and the slope of the correlation map there.

    The map is a power series with coefficients >= 0, hence convex on [0, 1], and 1 is a fixed point. If its slope at
    1 is more than one there is exactly one other, stable, and Newton's method from 0 climbs to it without overshoot.
    """
    length = w2 * second_moment(phi, q) + b2
    scale = torch.where(length > 0, q / length, 0.0)  # 1 at a fixed point of the length map
    slope = chi_1 * scale
    c = torch.ones_like(q)
    below = (slope > 1 + _CRITICAL).nonzero().flatten()
    if len(below):
        w2, b2, q, length, scale = (t[below] for t in (w2, b2, q, length, scale))
        at, gain = torch.zeros_like(q), torch.zeros_like(q)
        for angles in (6, 16):  # a coarse rule brings near, the full one then needs a step or two
            for _ in range(60):
                product, gain = expect_pair(lambda u, v: _product_and_slope(phi, u, v), q, q, at, angles=angles)
                value, gain = (w2 * product + b2) / length, scale * w2 * gain
                step = (value - at) / (1 - gain).clamp_min(1e-9)
                at = (at + step).clamp(0, 1)
                if bool((step.abs() < 1e-9).all()):
                    break
        c[below], slope[below] = at, gain
    return c, slope


def _product_and_slope(phi: Activation, u: Tensor, v: Tensor) -> Tensor:
    (a, slope_a), (b, slope_b) = value_and_derivative(phi, u), value_and_derivative(phi, v)
    return torch.stack([a * b, slope_a * slope_b])


def _depth_scale(slope: Tensor, never: Tensor | None = None) -> Tensor:
    """-1 / log(slope): 0 if the fixed point is reached at once, ``inf`` where it is not reached exponentially."""
    scale = -1 / slope.clamp_min(1e-300).log()
    away = (slope >= 1 - 1e-9) if never is None else (slope >= 1 - 1e-9) | never
    return torch.where(away, torch.inf, torch.where(slope <= 0, 0.0, scale))
