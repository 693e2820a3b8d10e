"""One object per population: everything that birth and death know of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_meanfield.particles import Neurons, Slice
from torch_meanfield.particles.population import named_tensors
from torch_meanfield.width.births.initialisers import Initialiser, initialisers_of
from torch_meanfield.width.births.recorder import LandscapeRecorder
from torch_meanfield.width.births.rule import BirthRule
from torch_meanfield.width.turnover.blocks import Blocks
from torch_meanfield.width.turnover.decide import Evidence
from torch_meanfield.width.turnover.potentials import Averages, Outgoing

Held = Mapping[int, Mapping[str, Tensor]]  # by the identity of an owner: its tensors by name


class Tracked(ABC):
    """A population and what is known of it.

    Attributes:
        population: as it is now.
        elapsed: sum of the learning rates since the last event.
        initialisers: of its incoming and own columns, by number of the column.
        recorder: of the loss around it before an event, or ``None``.
        reader: reads its potentials.
        averages: the table its potentials are averaged in, with others'.
    """

    averages: Averages
    _number: int  # in the table

    def __init__(self, population: Neurons | Blocks, reader: Outgoing | Blocks) -> None:
        self.population, self.reader = population, reader
        self.elapsed: Any = 0.0
        self.initialisers: dict[int, Initialiser] = {}
        self.recorder: LandscapeRecorder | None = None

    @property
    def name(self) -> str:
        """The population's name."""
        return self.population.name

    @abstractmethod
    def tensors(self) -> Sequence[Tensor]:
        """The tensors that the units own, of which none may be frozen."""

    def frozen(self) -> bool:
        """Whether one of its parameters is not being trained: then nothing may change in it."""
        return any(isinstance(t, nn.Parameter) and not t.requires_grad for t in self.tensors())

    # -- what is known ---------------------------------------------------------------------------------------------

    def sit_in(self, averages: Averages, number: int) -> None:
        """Take the columns ``number`` of the table ``averages``."""
        self.averages, self._number = averages, number

    @property
    def rows(self) -> Tensor:
        """The rows of :class:`.Averages`, a view of shape ``(6, n)``."""
        return self.averages.of(self._number)

    def evidence(self, batch_size: float | None = None) -> Evidence:
        """What a scheme decides from."""
        rows = self.rows
        weight = rows[2].clamp_min(torch.finfo(rows.dtype).tiny)
        window = self.averages.window
        quiet, age, fired = rows[3:]
        mean, square = rows[0] / weight, rows[1] / weight
        outgoing = self.reader.reach if isinstance(self.reader, Outgoing) else None
        return Evidence(mean, square, quiet, age, fired, window, batch_size, self.elapsed, outgoing)

    def move_(self, index: Tensor) -> None:
        """What is known goes where the units go: ``new[i] = old[index[i]]``."""
        rows = self.rows
        rows.copy_(rows.index_select(1, index.to(rows.device)))

    def forget_(self, places: Tensor) -> None:
        """Newborn units have no past."""
        self.rows.index_fill_(1, places.to(self.rows.device), 0)

    def begin_anew(self) -> None:
        """Forget everything that was watched."""
        self.rows.zero_()
        self.elapsed = 0.0
        if self.recorder is not None:
            self.recorder.drop()

    # -- what is replaced in the model -----------------------------------------------------------------------------

    def renewed(self, held: Held) -> Neurons | Blocks:
        """The population with the tensors that the model holds now."""
        return self.population

    def check_owned(self, owned: set[int]) -> None:
        """Raise if the optimizer does not train the population's parameters any more, by their identities."""
        return None


class TrackedNeurons(Tracked):
    """Neurons: their buffers may be replaced by ``model.to(...)``, and they are drawn anew from initialisers.

    Args:
        population: the units.
        model: where their layers are found.
        births: the way of being born.
    """

    population: Neurons

    def __init__(self, population: Neurons, model: nn.Module | None, births: BirthRule) -> None:
        super().__init__(population, Outgoing(population.outgoing))
        self.initialisers = initialisers_of(population, model)
        self.recorder = births.watch(population, model)
        names: dict[int, str] = {}
        if population.owner is not None:
            names = {id(t): name for name, t in named_tensors(population.owner).items()}
        self._names = [names.get(id(t)) for t in self.tensors()]

    def tensors(self) -> list[Tensor]:
        """See :meth:`Tracked.tensors`."""
        return [c.tensor for c in self.population.slices(self.population.columns)]

    def renewed(self, held: Held) -> Neurons:
        """The population with the buffers that its owner holds now under the same names.

        Raises:
            ValueError: a parameter was replaced, so that the optimizer holds another than the model, or removed.
        """
        population = self.population
        if population.owner is None:
            return population
        theirs = held[id(population.owner)]
        columns: list[Slice] = []
        for column, name in zip(population.slices(population.columns), self._names, strict=True):
            now = column.tensor if name is None else theirs.get(name)
            if now is column.tensor:
                columns.append(column)
                continue
            if now is None or isinstance(column.tensor, nn.Parameter) or now.shape != column.tensor.shape:
                raise ValueError(
                    f"{population.name}: {name!r} is no longer the tensor that the optimizer trains: it was replaced "
                    f"(by load_state_dict(assign=True), say) or removed (by a parametrization): make the optimizer and "
                    f"BirthDeathOptimizer after that; or it is gathered by FSDP2 since a forward pass without a "
                    f"backward pass: call reshard()"
                )
            columns.append(column.on(now))
        if all(a is b for a, b in zip(columns, population.columns, strict=True)):
            return population
        return Neurons(columns, population.roles, population.owner, population.name)


class TrackedBlocks(Tracked):
    """Residual blocks: their layer knows what a death and a birth among them mean."""

    population: Blocks

    def __init__(self, population: Blocks) -> None:
        super().__init__(population, population)

    def tensors(self) -> list[Tensor]:
        """See :meth:`Tracked.tensors`."""
        return self.population.parameters()

    def check_owned(self, owned: set[int]) -> None:
        """See :meth:`Tracked.check_owned`: under FSDP2 what a block owns may be a gathered copy.

        Raises:
            RuntimeError: it is.
        """
        if id(self.population.parameter) not in owned:
            raise RuntimeError(
                f"{self.name}: its parameters are not those that the optimizer trains. FSDP2 leaves them gathered "
                f"after a forward pass without a backward pass; call reshard() of the sharded model before "
                f"optimizer.step()"
            )


def held_by(populations: Iterable[Neurons | Blocks]) -> Held:
    """What the owners of ``populations`` hold now."""
    owners = {id(p.owner): p.owner for p in populations if p.owner is not None}
    return {key: named_tensors(owner) for key, owner in owners.items()}
