"""Reinjection: a vacant place is taken by a unit drawn anew, with outgoing weights 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_meanfield.particles import Slice
from torch_meanfield.width.births.rule import BirthRule, Vacancies
from torch_meanfield.width.draws import Draws

# initializer(rows, generator): fill one tensor for each incoming column in place, entry j for newborn j.
Initializer = Callable[[Sequence[Tensor], torch.Generator], None]


@dataclass(frozen=True)
class Reinject(BirthRule):
    """``births="reinject"`` without placement: incoming and own weights from the initialisers, outgoing weights 0.

    The birth leaves the network's function as it was.

    Args:
        initializer: the user's own for the incoming weights; ``None``: the layer's.
    """

    initializer: Initializer | None = None

    def newborns(self, vacancies: Vacancies, draws: Draws) -> dict[int, Tensor]:
        """See :meth:`.BirthRule.newborns`."""
        return self.draw(vacancies, draws.on(vacancies.population.outgoing[0].tensor.device))

    def draw(self, vacancies: Vacancies, generator: torch.Generator) -> dict[int, Tensor]:
        """As :meth:`newborns`, from a generator on the device of the population."""
        population = vacancies.population
        values: dict[int, Tensor] = {}
        columns = population.slices(population.columns)
        for i, column in enumerate(columns):
            shape = particle_shape(column, vacancies.count)
            like = column.tensor.detach()
            known = vacancies.initialisers.get(i)
            blank = torch.zeros(shape, dtype=like.dtype, device=like.device)  # plain, also beside a sharded one
            values[i] = blank if known is None else known.draw(shape, like, generator)
        if self.initializer is not None:
            incoming = [i for i, role in enumerate(population.roles) if role == "in"]
            self.initializer([_along_dimension(values[i], columns[i]) for i in incoming], generator)
        return values


def particle_shape(column: Slice, count: int) -> tuple[int, ...]:
    """Shape of ``count`` particles' entries of ``column``: that of ``by_particle`` with ``count`` in place of n."""
    shape = list(column.by_particle(column.tensor.detach()).shape)
    shape[column.dim + 1] = count
    return tuple(shape)


def _along_dimension(value: Tensor, column: Slice) -> Tensor:
    """``value`` as the user's tensor has it, particles along its own dimension (a view)."""
    return value.flatten(column.dim, column.dim + 2) if column.outer == column.inner == 1 else value
