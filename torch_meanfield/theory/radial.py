r"""Two isotropic Gaussians told apart by a two-layer network: a mean field with one coordinate, the radius.

With probability 1/2 each, y = 1 and :math:`x \sim N(0, (1 + \Delta)^2 I_d)`, or y = -1 and :math:`x \sim N(0, (1 -
\Delta)^2 I_d)`. The network :math:`f(x) = \int \sigma(\langle w, x\rangle)\,\rho(dw)` has units that rise in a straight
line from one constant to another. Data and initial law are rotation-invariant, so :math:`\rho` remains so, and f
depends on the length of x alone, through the average of a unit over the sphere:

.. math:: f(x) = \int q(r\,|x|)\,\rho(dr), \qquad q(z) = E_n\,\sigma(z\,n_1), \quad n \text{ uniform on the sphere}

which has a closed form up to one incomplete beta function. Everything is exact in every dimension d.

Source: Mei, Montanari, Nguyen 2018 (arXiv:1804.06561), the example of isotropic Gaussians.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from torch_meanfield.theory.gaussian import legendre, panels

_CELLS = 4_096  # of the table of the incomplete beta function, whose error is of the fourth order


@dataclass(frozen=True)
class RadialProblem:
    """The data and the unit.

    Args:
        dim: d, at least 2; ``None``: the limit of infinitely many dimensions, where <w, x> is (1 +- delta) r times a
            standard normal number.
        delta: How far the standard deviations of the classes are from 1, in (0, 1).
        low, high: The unit before its rise and after it.
        start, end: Where it rises, ``0 <= start < end``.

    Raises:
        ValueError: A number out of its range.

    The defaults are a unit of the form that Mei, Montanari, Nguyen 2018 use for this example.

    Example:
        >>> problem = RadialProblem(dim=40, delta=0.8)
        >>> round(float(problem.average(torch.tensor(0.0))), 6), round(float(problem.average(torch.tensor(1e6))), 3)
        (-2.5, 2.5)
    """

    dim: int | None
    delta: float
    low: float = -2.5
    high: float = 7.5
    start: float = 0.5
    end: float = 1.5

    def __post_init__(self) -> None:
        if self.dim is not None and (isinstance(self.dim, bool) or not isinstance(self.dim, int) or self.dim < 2):
            raise ValueError(f"dim must be an integer of at least 2, or None for infinitely many, got {self.dim!r}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must be in (0, 1): 1 - delta is a standard deviation; got {self.delta!r}")
        if not 0 <= self.start < self.end < math.inf:
            raise ValueError(f"the unit must rise between 0 <= start < end, got {self.start!r} and {self.end!r}")
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise ValueError(f"low and high must be finite, got {self.low!r} and {self.high!r}")

    def unit(self, t: Tensor) -> Tensor:
        """The unit itself, element-wise."""
        return self.low + (self.high - self.low) * ((t - self.start) / (self.end - self.start)).clamp(0, 1)

    def average(self, z: Tensor) -> Tensor:
        """q(z), the unit averaged over the sphere of radius z, element-wise; float64."""
        parts = [z * self._moment(t, z) - t * self._tail(t, z) for t in (self.start, self.end)]
        return self.low + (self.high - self.low) / (self.end - self.start) * (parts[0] - parts[1])

    def slope(self, z: Tensor) -> Tensor:
        """q'(z), element-wise."""
        rise = (self.high - self.low) / (self.end - self.start)
        return rise * (self._moment(self.start, z) - self._moment(self.end, z))

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """A quadrature of the data: the inputs' lengths, their weights and labels; ``(S,)`` each."""
        if self.dim is None:
            s, w = torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        else:
            s, w = _chi(self.dim, 12)
        lengths = torch.cat([(1 + self.delta) * s, (1 - self.delta) * s])
        return lengths, torch.cat([w, w]) / 2, torch.cat([torch.ones_like(s), -torch.ones_like(s)])

    def gaussian_radii(self, count: int, scale: float) -> Tensor:
        """Equally likely radii of w ~ N(0, scale^2 / d I), as ``(count,)`` quantiles; all ``scale`` if d is infinite.

        Raises:
            ValueError: A count below 1 or a scale that is not positive.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"count must be a positive integer, got {count!r}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale!r}")
        if self.dim is None:
            return torch.full((count,), float(scale), dtype=torch.float64)
        s, w = _chi(self.dim, 200)
        share, order = w.cumsum(0) - w / 2, (torch.arange(count, dtype=torch.float64) + 0.5) / count
        at = torch.searchsorted(share, order).clamp(1, len(s) - 1)
        left, right = share[at - 1], share[at]
        quantiles: Tensor = s[at - 1] + (s[at] - s[at - 1]) * (order - left) / (right - left)
        return scale / math.sqrt(self.dim) * quantiles

    def _moment(self, t: float, z: Tensor) -> Tensor:
        """E[n_1; z n_1 > t]."""
        c = t / z
        if self.dim is None:
            return torch.exp(-c.square() / 2) / math.sqrt(2 * math.pi)
        power: Tensor = (1 - c.clamp(max=1).square()).pow((self.dim - 1) / 2)
        scale = _constant(self.dim) / (self.dim - 1)
        return scale * power

    def _tail(self, t: float, z: Tensor) -> Tensor:
        """P(z n_1 > t)."""
        c = t / z
        if self.dim is None:
            share: Tensor = torch.special.ndtr(-c)
            return share
        values, h = _cap_table(self.dim)
        angle = torch.acos(c.clamp(max=1))
        cell = (angle / h).floor().clamp(max=_CELLS - 1)
        x = angle / h - cell
        i = cell.long()
        ends = [_constant(self.dim) * h * torch.sin(cell * h + j * h).pow(self.dim - 2) for j in (0, 1)]
        step = values[i + 1] - values[i]  # Hermite's cubic: values and slopes at both ends of a cell
        return (
            values[i]
            + x * ends[0]
            + x.square() * (3 * step - 2 * ends[0] - ends[1] + x * (ends[0] + ends[1] - 2 * step))
        )


def _constant(dim: int) -> float:
    """C with density C (1 - n^2)^((d - 3) / 2) of the first coordinate on the sphere."""
    return math.exp(math.lgamma(dim / 2) - math.lgamma((dim - 1) / 2)) / math.sqrt(math.pi)


@lru_cache(maxsize=8)
def _cap_table(dim: int) -> tuple[Tensor, float]:
    """The share of the sphere within an angle of a pole, on a grid of angles up to pi / 2."""
    h = math.pi / 2 / _CELLS
    x, w = legendre(6)
    angles = h * (torch.arange(_CELLS, dtype=torch.float64)[:, None] + x)
    cells = _constant(dim) * h * (torch.sin(angles).pow(dim - 2) @ w)
    return torch.cat([torch.zeros(1, dtype=torch.float64), cells.cumsum(0)]), h


@lru_cache(maxsize=8)
def _chi(dim: int, cells: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the length of a standard normal vector in ``dim`` dimensions."""
    low, high = max(0.0, dim**0.5 - 8), dim**0.5 + 8
    edges = tuple(low + (high - low) * k / cells for k in range(cells + 1))
    s, w = panels(edges, 6)
    w = w * torch.exp((dim - 1) * s.log() - s.square() / 2 - (dim / 2 - 1) * math.log(2) - math.lgamma(dim / 2))
    keep = w > 1e-16
    return s[keep], w[keep] / w[keep].sum()
