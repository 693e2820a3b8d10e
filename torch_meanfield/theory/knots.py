r"""Where a wide ReLU network of one input bends: the limit of noisy, regularised SGD.

The network is :math:`f(x) = \frac1n \sum_i a_i (w_i x + b_i)_+`, trained on M points with weight decay
:math:`\lambda` and vanishing noise. As units grow many, the law of the particles goes to a minimiser of

.. math:: \frac1{2M} \sum_j (f(x_j) - y_j)^2 + \frac\lambda2 \int (a^2 + w^2 + b^2)\,d\mu,

and with the lengths of a and (w, b) balanced that is a convex problem over signed measures of directions,
:math:`f(x) = \int (u \cdot (x, 1))_+\,d\nu(u)` with penalty :math:`\lambda|\nu|`. It is solved here to the end, without
a network. Source: Shevchenko, Kungurtsev, Mondelli 2021 (arXiv:2111.02278): f is piecewise linear, with at most three
knots between neighbouring data; Rosset, Swirszcz, Srebro, Zhu 2007 for the convex problem.
"""

from __future__ import annotations

import importlib
import math
from typing import NamedTuple

import torch
from torch import Tensor


class Knots(NamedTuple):
    """A piecewise linear function as a sum of K bent lines; float64.

    Attributes:
        angle: Of the directions u = (cos, sin), ``(K,)``.
        mass: Of the measure there, ``(K,)``; signed.
        residual: y - f(x) at the data, ``(M,)``.
    """

    angle: Tensor
    mass: Tensor
    residual: Tensor

    @property
    def location(self) -> Tensor:
        """Where each bends: -b / w, ``(K,)``."""
        return -torch.tan(self.angle)

    @property
    def bend(self) -> Tensor:
        """By how much the slope changes there, from left to right: ``(K,)``."""
        return self.mass * self.angle.cos().abs()

    def __call__(self, x: Tensor) -> Tensor:
        """f at any points, in the shape of ``x``."""
        return _units(x.double(), self.angle) @ self.mass


def regularised_knots(x: Tensor, y: Tensor, penalty: float, *, tolerance: float = 1e-9) -> Knots:
    r"""The function that noisy SGD of a wide ReLU network converges to, when the noise vanishes.

    With residuals r, the measure lives where :math:`p(u) = \frac1M \sum_j r_j (u \cdot (x_j, 1))_+` reaches
    :math:`\pm\lambda`, its extremes. For units that bend in one gap, p is :math:`u \cdot v` with v the sum over the
    active data: it has one extreme at the most for each orientation, at :math:`u = \pm v / |v|`. So a knot that is not
    at a datum is where the active residuals balance,

    .. math:: x_* = -\sum_{j\text{ active}} r_j \Big/ \sum_{j\text{ active}} r_j x_j,

    and in no gap are there more than two such. The dual problem, the point of the polytope :math:`|p| \le \lambda`
    nearest to y, is solved by cutting planes at the extremes.

    Args:
        x: ``(M,)``, distinct.
        y: ``(M,)``.
        penalty: :math:`\lambda`, positive.
        tolerance: By which p may exceed :math:`\lambda`, relative.

    Raises:
        ValueError: Shapes that do not fit, equal or infinite data, numbers out of their range.
        ImportError: scipy is not installed.
        RuntimeError: The tolerance is not reached in 200 rounds, as may happen for a tiny penalty.

    Source: Shevchenko, Kungurtsev, Mondelli 2021, the minimiser of the free energy and its knots; Lawson and Hanson
    1974 for the projection onto a polytope.
    """
    _check(x, y, penalty, tolerance)
    x, y = x.double(), y.double()
    edges = _edges(x)
    angle, residual = edges, y
    for _ in range(200):
        cuts = _units(x, angle).T / len(x)
        mass, residual = _project(cuts, y, penalty)
        extremes = torch.cat([edges, _extremes(x, residual, edges)])
        height = (_units(x, extremes).T @ residual).abs() / len(x)
        if float(height.max()) <= penalty * (1 + tolerance):
            return _merged(angle, mass / len(x), residual, edges)
        # cuts that hold nothing back are dropped: the distance from y still rises in every round
        held = torch.cat([edges, angle[len(edges) :][mass[len(edges) :] != 0]])
        angle = torch.cat([held, extremes[height > penalty * (1 + tolerance / 2)]])
    raise RuntimeError(
        f"after 200 rounds the potential exceeds the penalty by {float(height.max()) / penalty - 1:.1e} of it; a "
        f"tolerance above that or a larger penalty than {penalty!r} helps"
    )


def knots_between(
    location: Tensor, bend: Tensor, x: Tensor, *, apart: float, share: float = 1e-3
) -> list[list[Tensor]]:
    """Sort the knots of a function by the gaps between neighbouring data.

    Units that bend within ``apart`` of the one before count as one knot, at their mean, if together they bend by more
    than ``share`` of the sum of all (absolute) bends. Works for trained networks as for :class:`Knots`.

    Args:
        location, bend: Of the units, ``(K,)`` each.
        x: The data, ``(M,)``.
        apart: At least 0.
        share: Between 0 and 1.

    Returns:
        For each of the M - 1 gaps, from left to right, its knots: tensors (location, bend, distance to the next datum).

    Raises:
        ValueError: Shapes that do not fit or numbers out of their range.
    """
    if location.dim() != 1 or location.shape != bend.shape or x.dim() != 1:
        raise ValueError(f"location and bend must be (K,) and x (M,), got {tuple(location.shape)}, {tuple(bend.shape)}")
    if not apart >= 0 or not 0 <= share < 1:
        raise ValueError(f"apart must be at least 0 and share in [0, 1), got {apart!r} and {share!r}")
    data = x.double().sort().values
    inside = (location >= data[0]) & (location <= data[-1])
    order = location[inside].argsort()
    at, size = location[inside][order].double(), bend[inside][order].double()
    group = torch.cat([at.new_zeros(1), (at.diff() > apart).double().cumsum(0)])[: len(at)].long()
    found: list[list[Tensor]] = [[] for _ in range(len(data) - 1)]
    for members in (group == g for g in sorted(set(group.tolist()))):
        total, weight = size[members].sum(), size[members].abs()
        if float(total.abs()) <= share * float(bend.abs().sum()):
            continue
        middle = (weight @ at[members]) / weight.sum()
        gap = int(torch.bucketize(middle, data[1:-1]))
        found[gap].append(torch.stack([middle, total, (data - middle).abs().min()]))
    return found


def _units(x: Tensor, angle: Tensor) -> Tensor:
    return (x[..., None] * angle.cos() + angle.sin()).clamp(min=0)


def _edges(x: Tensor) -> Tensor:
    """The directions that are 0 at a datum, in rising order; between them the active data stay the same."""
    first = torch.atan2(-x, torch.ones_like(x))
    return (torch.cat([first, first + math.pi]) % (2 * math.pi)).sort().values


def _extremes(x: Tensor, residual: Tensor, edges: Tensor) -> Tensor:
    """The directions within the arcs at which p has an extreme."""
    width = torch.cat([edges[1:], edges[:1] + 2 * math.pi]) - edges
    active = (_units(x, edges + width / 2) > 0).double()
    top = torch.atan2(residual @ active, (residual * x) @ active)
    beyond = torch.stack([top - edges, top + math.pi - edges]) % (2 * math.pi)
    return (edges + beyond)[beyond < width] % (2 * math.pi)


def _project(cuts: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """The point r nearest to y with |cuts @ r| at most ``penalty``, and the (signed) multipliers."""
    try:
        nnls = importlib.import_module("scipy.optimize").nnls
    except ImportError as error:
        raise ImportError("regularised_knots needs scipy: pip install 'torch-meanfield[theory]'") from error
    bounds = torch.cat([-cuts, cuts])
    slack = torch.cat([cuts @ y, -cuts @ y]) - penalty
    system = torch.cat([bounds.T, slack[None]]).numpy()
    target = torch.zeros(len(y) + 1, dtype=y.dtype)
    target[-1] = 1
    found = torch.from_numpy(nnls(system, target.numpy(), maxiter=100 * system.shape[1])[0])
    rest = torch.from_numpy(system) @ found - target
    mass = -found / rest[-1]
    return mass[: len(cuts)] - mass[len(cuts) :], y - rest[:-1] / rest[-1]


def _merged(angle: Tensor, mass: Tensor, residual: Tensor, edges: Tensor) -> Knots:
    """One atom for the cuts of one sign in one arc, as close to each other as the tolerance lets them be."""
    angle, mass = angle[mass != 0], mass[mass != 0]
    on_edge = (angle[:, None] == edges).any(1)
    key = 2 * torch.bucketize(angle, edges, right=True) % (2 * len(edges)) + (mass > 0)
    key = torch.where(on_edge, 2 * len(edges) + torch.arange(len(angle)), key)
    keys = sorted(set(key.tolist()))
    sums = [(mass[:, None] * torch.stack([angle.cos(), angle.sin()], 1))[key == k].sum(0) for k in keys]
    signs = [mass[key == k][0].sign() for k in keys]
    if not sums:
        return Knots(angle, mass, residual)
    vector, sign = torch.stack(sums), torch.stack(signs)
    unit = vector * sign[:, None]
    return Knots(torch.atan2(unit[:, 1], unit[:, 0]) % (2 * math.pi), sign * vector.norm(dim=1), residual)


def _check(x: Tensor, y: Tensor, penalty: float, tolerance: float) -> None:
    if x.dim() != 1 or x.shape != y.shape or not len(x):
        raise ValueError(f"x and y must be (M,), got {tuple(x.shape)} and {tuple(y.shape)}")
    if not bool(torch.isfinite(x).all() and torch.isfinite(y).all()) or len(set(x.tolist())) < len(x):
        raise ValueError("x and y must be finite and all x distinct; take the mean of the labels of equal ones")
    for name, value in (("penalty", penalty), ("tolerance", tolerance)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, got {value!r}")
