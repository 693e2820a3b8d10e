"""Newborn units as large as units are by now: for networks that go on learning while their weights have grown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_meanfield.particles import Slice
from torch_meanfield.particles.copying import whole
from torch_meanfield.particles.slices import places_of
from torch_meanfield.width.births.reinject import Reinject
from torch_meanfield.width.births.rule import Vacancies
from torch_meanfield.width.draws import Draws

AS_THE_LIVING = 0.5  # of the newborn units are as large as the median, the others between that and the draw


@dataclass(frozen=True)
class Typical(Reinject):
    """``births="typical"``: drawn from the layer's own initialiser, at a size between that one's and the living's.

    With r the median norm of the incoming weights of the units that stay over that of the draw, a newborn unit is
    scaled by r with probability 1/2, otherwise by :math:`r^u` with u uniform on [0, 1]. As large as the living, it is
    not swept off by the first updates, which matters where inputs have a mean (pixels in [0, 1]) and under a layer
    norm; as small as at the start, it adapts faster, which matters where they have none. Which of the two holds, a
    population finds out by the units that survive. Columns of one number a unit (biases) are drawn as they are;
    outgoing weights are 0, so that the function is kept.
    """

    def newborns(self, vacancies: Vacancies, draws: Draws) -> dict[int, Tensor]:
        """See :meth:`.BirthRule.newborns`."""
        population, k = vacancies.population, vacancies.count
        values = super().newborns(vacancies, draws)
        if self.initializer is not None or k == population.size:  # the user's own size, or nobody to compare with
            return values
        like = population.outgoing[0].tensor
        u = draws.uniform(2, k, like=torch.empty(0, device=like.device))
        exponent = torch.where(u[0] < AS_THE_LIVING, 1.0, u[1])
        living = places_of(~_mask(vacancies.places, population.size), population.size - k)
        return {**values, **_resized(population.slices(population.columns), population.roles, values, living, exponent)}


def _resized(
    columns: Sequence[Slice], roles: tuple[str, ...], values: Mapping[int, Tensor], living: Tensor, exponent: Tensor
) -> dict[int, Tensor]:
    out = {}
    for i, (column, role) in enumerate(zip(columns, roles, strict=True)):
        drawn = values[i]
        if role != "in" or drawn.numel() == drawn.shape[column.dim + 1]:
            continue
        rows = column.by_particle(whole(column.tensor.detach())).index_select(column.dim + 1, living)
        median = _norms(rows, column.dim + 1).median()
        ratio = median / _norms(drawn, column.dim + 1).clamp_min(torch.finfo(median.dtype).tiny)
        # a unit whose size is 0 gives nothing to go by
        factor = torch.where(median > 0, ratio, 1.0) ** exponent.to(ratio.dtype)
        out[i] = drawn * factor.to(drawn.dtype).view(-1, *[1] * (drawn.ndim - column.dim - 2))
    return out


def _norms(rows: Tensor, dim: int) -> Tensor:
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return wide.square().sum([d for d in range(rows.ndim) if d != dim]).sqrt()


def _mask(places: Tensor, n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.bool, device=places.device).index_fill_(0, places, True)
