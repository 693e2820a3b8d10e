"""Newborn units as large as units are by now, or as He et al. draw them: for networks whose weights have grown."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_meanfield.particles import Slice
from torch_meanfield.particles.copying import whole
from torch_meanfield.particles.slices import places_of
from torch_meanfield.width.births.reinject import Reinject
from torch_meanfield.width.births.rule import Vacancies
from torch_meanfield.width.draws import Draws

AS_THE_LIVING = 0.5  # the probability that a newborn unit is as large as the living are


@dataclass(frozen=True)
class Typical(Reinject):
    r"""``births="typical"``: drawn from the layer's own initialiser, at one of two sizes.

    With probability 1/2 the incoming weights of a newborn unit get the median norm of those of the units that stay,
    otherwise the norm that weights of variance 2 / fan-in have (He et al. 2015), :math:`\sqrt{2}` for one row, or the
    draw's own if that is larger. As large as the living, it is not swept off by the first updates, which matters where
    inputs have a mean (pixels in [0, 1]) and under a layer norm; as small as at the start it adapts faster, which
    matters where they have none. Which of the two holds, a population finds out by the units that survive. Under a norm
    that mixes units (a layer norm) all are as large as the living: a unit of another size would change what all others
    are divided by. Biases and outgoing weights are 0: but for such a norm, the birth leaves the function as it is.
    """

    def newborns(self, vacancies: Vacancies, draws: Draws) -> dict[int, Tensor]:
        """See :meth:`.BirthRule.newborns`."""
        population, k = vacancies.population, vacancies.count
        values = super().newborns(vacancies, draws)
        if self.initializer is not None:  # the user's own size
            return values
        places = vacancies.places
        like_living = draws.uniform(k, like=torch.empty(0, device=places.device)) < AS_THE_LIVING
        if population.own and all(isinstance(c.tensor, nn.Parameter) for c in population.own):
            like_living = torch.ones_like(like_living)  # batch norms, which do not mix them, hold running averages
        dying = torch.zeros(population.size, dtype=torch.bool, device=places.device).index_fill_(0, places, True)
        living = places_of(~dying, population.size - k)
        for i, (column, role) in enumerate(zip(population.slices(population.columns), population.roles, strict=True)):
            if role == "in" and column.tensor.ndim == 1:
                values[i] = torch.zeros_like(values[i])
            elif role == "in":
                values[i] = _resized(column, values[i], living, like_living)
        return values


def _resized(column: Slice, drawn: Tensor, living: Tensor, like_living: Tensor) -> Tensor:
    dim = column.dim + 1
    norms = _norms(drawn, dim)
    target = norms.clamp_min(math.sqrt(2 * column.outer * column.inner))
    if len(living):  # a median of 0 gives nothing to go by
        median = _norms(column.by_particle(whole(column.tensor.detach())).index_select(dim, living), dim).median()
        target = torch.where(like_living & (median > 0), median, target)
    factor = target / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    return drawn * factor.to(drawn.dtype).view(-1, *[1] * (drawn.ndim - dim - 1))


def _norms(rows: Tensor, dim: int) -> Tensor:
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return wide.square().sum([d for d in range(rows.ndim) if d != dim]).sqrt()
