"""The one protocol that a way of being born has, and what it is told of the places that it fills."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from torch_meanfield.particles import Neurons
from torch_meanfield.width.births.initialisers import Initialiser
from torch_meanfield.width.births.recorder import LandscapeRecorder
from torch_meanfield.width.draws import Draws


@dataclass(frozen=True)
class Vacancies:
    """The places of one population that one event gives to units drawn anew.

    Attributes:
        population: whose places.
        initialisers: of the incoming and own columns, by number of the column.
        places: int64 ``(k,)``: where the newborn units go.
        harmful: how many of them, the first ones, replace units that had a function.
        recorder: what was recorded of the loss around the units, if the rule asked for it in :meth:`BirthRule.watch`.
    """

    population: Neurons
    initialisers: Mapping[int, Initialiser]
    places: Tensor
    harmful: int
    recorder: LandscapeRecorder | None

    @property
    def count(self) -> int:
        """Number of newborn units k."""
        return len(self.places)


class BirthRule(Protocol):
    """A way of being born: one class. Pass an instance as ``BirthDeathOptimizer(..., births=...)``.

    Take randomness from the ``draws`` that are passed, which are alike on all data-parallel ranks. Make it a dataclass,
    so that ranks can compare its settings.

    Attributes:
        inherits: whether a vacant place is taken by the copy of another unit (:meth:`share_` is called then); otherwise
            by a unit drawn anew (:meth:`newborns`), as reinjected units always are.
    """

    inherits: bool = False

    def watch(self, population: Neurons, model: nn.Module | None) -> LandscapeRecorder | None:
        """What is to record the loss around ``population`` over the last steps before an event; nothing by default."""
        return None

    def share_(self, population: Neurons, index: Tensor, draws: Draws) -> None:
        """Change parents and copies, in place, after ``index`` (int64 ``(n,)``) was carried out; nothing by default."""
        return None

    def newborns(self, vacancies: Vacancies, draws: Draws) -> dict[int, Tensor]:
        """What the k newborn units own, by number of the column: the shape of ``Slice.by_particle`` with k for n."""
        ...
