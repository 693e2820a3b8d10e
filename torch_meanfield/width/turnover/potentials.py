r"""Potentials: what the loss says of each unit, read off gradients that exist anyway and averaged over steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from torch_meanfield.particles import Slice
from torch_meanfield.particles.copying import whole
from torch_meanfield.particles.neurons import Neurons
from torch_meanfield.width.turnover.blocks import Blocks


def potential(population: Neurons | Blocks) -> Tensor | None:
    r"""The potential of every unit at the present weights and gradients; shape ``(n,)``, float32 (float64 kept).

    .. math:: V_i = \sum_{k} a_{ik}\, \partial E / \partial a_{ik}

    over all outgoing weights :math:`a_{ik}` of unit i. In a network scaled by 1/n this is 1/n times the first
    variation :math:`V(\theta_i) = E[(f(x) - y)\,\varphi(x, \theta_i)]` of the energy; the factor cancels against the
    learning rate, which is then n times the time step, so that ``lr * V_i`` is the same number in either scaling.

    Of residual blocks it is the derivative by the logarithm of their step size; see there.

    Returns:
        ``None`` if an outgoing weight has no gradient.

    Source: Rotskoff et al. 2019; Rotskoff 2020, (22), by the homogeneity (5).
    """
    return _reader(population)()


def _reader(population: Neurons | Blocks) -> Callable[[], Tensor | None]:
    """What reads the potentials of ``population``; its columns are looked up once, not at every step."""
    return population.potential if isinstance(population, Blocks) else partial(_total, population.outgoing)


def read_from(population: Neurons | Blocks) -> Tensor:
    """The parameter that tells a population's device and whose learning rate is its clock."""
    return population.position if isinstance(population, Blocks) else population.outgoing[0].tensor


def _total(outgoing: Sequence[Slice]) -> Tensor | None:
    total: Tensor | None = None
    for column in outgoing:
        if column.tensor.grad is None:
            return None
        part = _product(column, column.tensor.grad)
        total = part if total is None else total + part
    return total


def _product(column: Slice, grad: Tensor) -> Tensor:
    a, g = whole(column.tensor), whole(grad)
    if a.dtype not in (torch.float32, torch.float64):
        a, g = a.float(), g.float()
    if column.outer == column.inner == 1:
        if a.ndim == 2:
            dot: Tensor = torch.linalg.vecdot(a, g, dim=1 - column.dim)
            return dot
        return (a * g).sum([d for d in range(a.ndim) if d != column.dim]) if a.ndim > 1 else a * g
    product = column.by_particle(a * g)
    return product.sum([d for d in range(product.ndim) if d != column.dim + 1])


class Averages:
    r"""Exponential averages over steps of the potentials of several populations on one device.

    With :math:`\beta = 1 - 1/\text{window}` and the weight :math:`w` of what has been seen,

    .. math:: m_i \leftarrow \beta m_i + (1-\beta) V_i, \quad q_i \leftarrow \beta q_i + (1-\beta) V_i^2,
              \quad w_i \leftarrow \beta w_i + (1-\beta)

    and :math:`m_i / w_i` is the averaged potential, :math:`q_i / w_i` its mean square step by step. A unit whose
    potential only fluctuates has :math:`m_i^2 \ll q_i w_i`. ``quiet`` counts the steps in a row at which it was
    exactly 0, which is a unit that reaches nothing (a dead ReLU). The four are rows of one tensor, so that one step
    costs a handful of small operations whatever the number of populations.

    Kept here and not in ``optimizer.state``: optimizers initialise lazily on an empty state, and loading one casts
    what is in it to the parameter's dtype.

    Args:
        populations: all on one device.
        window: length of the average in steps.
    """

    def __init__(self, populations: Sequence[Neurons | Blocks], window: float) -> None:
        self.populations = list(populations)
        self.decay = 1 - 1 / window
        self._readers = [_reader(p) for p in self.populations]
        double = any(read_from(p).dtype == torch.float64 for p in self.populations)
        self.sizes = [p.size for p in self.populations]
        self.dtype, self.device = torch.float64 if double else torch.float32, read_from(self.populations[0]).device
        self.table = torch.zeros(4, sum(self.sizes), dtype=self.dtype, device=self.device)
        self.ok = torch.ones((), dtype=torch.bool, device=self.device)

    def follow_device_(self) -> bool:
        """Go where the populations are now, after ``model.to(device)``; whether that is elsewhere."""
        device = read_from(self.populations[0]).device
        moved = device != self.device
        if moved:
            self.device, self.table, self.ok = device, self.table.to(device), self.ok.to(device)
        return moved

    def of(self, i: int) -> Tensor:
        """The rows (m, q, w, quiet) of population i; shape ``(4, n)``, a view."""
        start = sum(self.sizes[:i])
        return self.table[:, start : start + self.sizes[i]]

    @torch.no_grad()
    def read(self, scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Take in the potentials of this step; on a step that is skipped or not finite, nothing. No host read.

        Args:
            scale: what the gradients are still multiplied by (a ``GradScaler`` over a fused optimizer).
            found_inf: not 0 if the optimizer will skip this step on the device.
        """
        values = [read() for read in self._readers]
        seen = [v for v in values if v is not None]
        if not seen:
            return
        present = None
        if len(seen) < len(values):
            present = torch.cat(
                [self.table.new_full((n,), v is not None) for n, v in zip(self.sizes, values, strict=True)]
            )
            values = [self.table.new_zeros(n) if v is None else v for n, v in zip(self.sizes, values, strict=True)]
        value = torch.cat([v.to(self.dtype) for v in values if v is not None])
        if scale is not None:
            value = value / scale.to(self.device)
        ok = value.sum().isfinite()  # a sum is not finite if one of its terms is not
        if found_inf is not None:
            ok = ok & (found_inf.to(self.device) == 0).all()
        self.ok = ok
        keep = ok if present is None else ok & present.bool()
        zero = value == 0
        new = torch.stack([value, value.square(), torch.ones_like(value), zero.to(self.dtype)])
        # rows 0..2 are averages; row 3 counts
        averaged = self.table[:3].lerp(new[:3], 1 - self.decay)
        counted = (self.table[3] + 1) * new[3]
        self.table.copy_(torch.where(keep, torch.cat([averaged, counted[None]]), self.table))

    def mature(self, i: int) -> Tensor:
        """Which units of population i have been watched for a window's length; bool, shape ``(n,)``."""
        watched = self.of(i)[2]
        # after a window's length the weight is 1 - decay^window; a little less, for rounding
        return watched.gt(1 - self.decay ** (0.999 / (1 - self.decay)) if self.decay > 0 else 0.0)

    def mean(self, i: int) -> Tensor:
        """Averaged potentials of population i, shape ``(n,)``; 0 where nothing has been seen."""
        rows = self.of(i)
        return rows[0] / rows[2].clamp_min(torch.finfo(self.dtype).tiny)

    def coherence(self, i: int) -> Tensor:
        r"""Averaged potential over its root mean square, in [-1, 1]: 1 if it was the same always, near 0 if noise."""
        return self.mean(i) / self.square(i).sqrt().clamp_min(torch.finfo(self.dtype).tiny)

    def square(self, i: int) -> Tensor:
        """Averaged squares of the potentials of population i, shape ``(n,)``; 0 where nothing has been seen."""
        rows = self.of(i)
        return rows[1] / rows[2].clamp_min(torch.finfo(self.dtype).tiny)

    def move_(self, i: int, index: Tensor) -> None:
        """The averages go where their particles go: ``new[j] = old[index[j]]``."""
        rows = self.of(i)
        rows.copy_(rows.index_select(1, index.to(self.device)))

    def forget_(self, i: int, places: Tensor) -> None:
        """Newborn units have no past."""
        self.of(i).index_fill_(1, places.to(self.device), 0)
