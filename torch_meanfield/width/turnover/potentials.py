r"""Potentials: what the loss says of each unit, read off gradients that exist anyway and averaged over steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_meanfield.particles import Neurons, Slice
from torch_meanfield.particles.copying import whole
from torch_meanfield.width.turnover.blocks import Blocks

STEPS = 100  # how many steps' potentials are kept before they are averaged, unless that takes much memory
ENTRIES = 2**20


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
    return population.potential() if isinstance(population, Blocks) else Outgoing(population.outgoing).potential()


class Outgoing:
    """Reads the potentials of neurons from their outgoing weights.

    Args:
        columns: the outgoing columns of one population.
    """

    def __init__(self, columns: Sequence[Slice]) -> None:
        self.columns = columns
        self.size = columns[0].size
        first = columns[0]
        # One plain matrix, which most populations have, is read by one call.
        plain = len(columns) == 1 and first.tensor.ndim == 2 and first.outer == first.inner == 1
        self._matrix = first.tensor if plain and type(first.tensor) is nn.Parameter else None
        self._along = 1 - first.dim

    @property
    def parameter(self) -> Tensor:
        """The parameter that tells the population's device and precision, and whose learning rate is its clock."""
        return self.columns[0].tensor

    def potential(self) -> Tensor | None:
        """See :func:`potential`."""
        total: Tensor | None = None
        for column in self.columns:
            if column.tensor.grad is None:
                return None
            part = _product(column, column.tensor, column.tensor.grad)
            total = part if total is None else total + part
        return total

    def reach(self) -> Tensor | None:
        r"""The most that the potential of each unit could be; shape ``(n,)``, float32 (float64 kept).

        .. math:: \|a_i\|\, \|\partial E / \partial a_i\| \ge |V_i|

        All units of a layer are read with the same errors, so that it tells the size of their activations times that
        of their outgoing weights: the contribution utility of continual backprop, off gradients that exist anyway.

        Returns:
            ``None`` if an outgoing weight has no gradient.

        Source: Dohare et al. 2024 (contribution utility); Cauchy and Schwarz.
        """
        weights: Tensor | None = None
        gradients: Tensor | None = None
        for column in self.columns:
            if column.tensor.grad is None:
                return None
            w, g = (_product(column, t, t) for t in (column.tensor, column.tensor.grad))
            weights, gradients = (w, g) if weights is None or gradients is None else (weights + w, gradients + g)
        return None if weights is None or gradients is None else weights.sqrt() * gradients.sqrt()

    def read_into(self, out: Tensor) -> bool:
        """Write the present potentials to ``out``, ``(n,)``; ``False`` if there are none."""
        matrix = self._matrix
        if matrix is not None and type(grad := matrix.grad) is Tensor and grad.dtype == matrix.dtype == out.dtype:
            torch.linalg.vecdot(matrix, grad, dim=self._along, out=out)
            return True
        value = self.potential()
        if value is not None:
            out.copy_(value)
        return value is not None


def _product(column: Slice, one: Tensor, other: Tensor) -> Tensor:
    """The sum of one times the other over what belongs to each unit; both as large as the column's tensor."""
    a, g = whole(one), whole(other)
    if column.tensor.dtype not in (torch.float32, torch.float64):
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
    exactly 0, which is a unit that reaches nothing (a ReLU that never fires), ``age`` the steps at which it was
    watched, ``fired`` those at which it was not 0. The six are rows of one table.

    The potentials of the last steps wait in a buffer until somebody asks for the averages or the buffer is full, so
    that most steps cost one product for each population; the averages are the same bits whenever they are taken.

    Kept here and not in ``optimizer.state``: optimizers initialise lazily on an empty state, and loading one casts
    what is in it to the parameter's dtype.

    Args:
        readers: of populations that all are on one device.
        window: length of the average in steps.
    """

    def __init__(self, readers: Sequence[Outgoing | Blocks], window: float) -> None:
        self.readers = list(readers)
        self.window = window
        self._weight = 1 - (1 - 1 / window)  # of the newest step
        self.sizes = [r.size for r in self.readers]
        double = any(r.parameter.dtype == torch.float64 for r in self.readers)
        self.dtype, self.device = torch.float64 if double else torch.float32, self.readers[0].parameter.device
        self._table = torch.zeros(6, sum(self.sizes), dtype=self.dtype, device=self.device)
        self._ok = torch.ones((), dtype=torch.bool, device=self.device)
        self._empty()

    def _empty(self) -> None:
        n = sum(self.sizes)
        steps = max(4, min(STEPS, ENTRIES // n))
        self._buffer = torch.zeros(steps, n, dtype=self.dtype, device=self.device)
        self._parts = [row.split(self.sizes) for row in self._buffer]
        self._present: list[Tensor | None] = []  # for each row: which entries were read, None for all

    def __getstate__(self) -> dict[str, Any]:
        self._fold()
        return {k: v for k, v in self.__dict__.items() if k not in ("_buffer", "_parts", "_present")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._empty()

    @property
    def table(self) -> Tensor:
        """The rows (m, q, w, quiet, age, fired) of all populations, beside each other."""
        self._fold()
        return self._table

    @property
    def ok(self) -> Tensor:
        """Whether the potentials that were read last are finite, and their step was not skipped; bool ``()``."""
        self._fold()
        return self._ok

    def silent_for(self, steps: int) -> bool:
        """Whether any unit may have had potential 0 at the last ``steps`` steps that count; no false no. One host read.

        Asked of the buffer where it reaches so far, so that it need not be averaged for that. (If the last step is not
        finite, nothing happens whatever the answer.)
        """
        k = len(self._present)
        if k < steps or any(p is not None for p in self._present):
            return bool((self.table[3] >= steps).any())
        if steps == 1:
            return not float(self._buffer[k - 1].abs().min()) > 0
        low, high = torch.stack(self._buffer[k - steps : k].abs().amax(0).aminmax()).tolist()
        return not (low > 0 and high < math.inf)  # a step that is not finite does not count

    def of(self, i: int) -> Tensor:
        """The rows (m, q, w, quiet, age, fired) of population i; shape ``(6, n)``, a view."""
        start = sum(self.sizes[:i])
        return self.table[:, start : start + self.sizes[i]]

    def follow_device_(self) -> bool:
        """Go where the populations are now, after ``model.to(device)``; whether that is elsewhere."""
        device = self.readers[0].parameter.device
        moved = device != self.device
        if moved:
            table, ok = self.table, self._ok
            self.device, self._table, self._ok = device, table.to(device), ok.to(device)
            self._empty()
        return moved

    @torch.no_grad()
    def read(self, scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Take in the potentials of this step; on a step that is skipped or not finite, nothing. No host read.

        Args:
            scale: what the gradients are still multiplied by (a ``GradScaler`` over a fused optimizer).
            found_inf: not 0 if the optimizer will skip this step on the device.
        """
        k = len(self._present)
        seen = [reader.read_into(out) for reader, out in zip(self.readers, self._parts[k], strict=True)]
        present = None
        if not all(seen):
            if not any(seen):
                return
            for was_seen, out in zip(seen, self._parts[k], strict=True):
                if not was_seen:
                    out.zero_()
            present = torch.cat(
                [self._buffer.new_full((n,), s, dtype=torch.bool) for n, s in zip(self.sizes, seen, strict=True)]
            )
        if scale is not None:
            self._buffer[k].div_(scale.to(self.device))
        if found_inf is not None:
            self._buffer[k].masked_fill_((found_inf.to(self.device) != 0).any(), torch.nan)
        self._present.append(present)
        if len(self._present) == len(self._buffer):
            self._fold()

    @torch.no_grad()
    def _fold(self) -> None:
        """Average what waits in the buffer, step by step."""
        steps = len(self._present)
        if not steps:
            return
        present, self._present = self._present, []
        values = self._buffer[:steps]
        fine = values.sum(1).isfinite()  # a sum is not finite if one of its terms is not
        self._ok = fine[-1]
        keep = fine[:, None]
        if any(p is not None for p in present):
            everywhere = torch.ones_like(values[0], dtype=torch.bool)
            keep = keep & torch.stack([everywhere if p is None else p for p in present])
        values = torch.where(keep, values, 0)
        counted = keep.to(self.dtype)
        weights = (counted * self._weight).unbind()
        averaged = self._table[:3]
        new = torch.stack([values, values.square(), torch.ones_like(values)], 1)
        for row, w in zip(new, weights, strict=True):
            averaged.lerp_(row, w)
        nonzero = keep & (values != 0)
        silent = nonzero.flip(0).cumsum(0).flip(0) == 0  # from that step on
        self._table[3].mul_(~nonzero.any(0)).add_((counted * silent).sum(0))
        self._table[4:].add_(torch.stack([keep.expand_as(nonzero), nonzero]).sum(1))
