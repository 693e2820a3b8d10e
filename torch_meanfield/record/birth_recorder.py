"""Follow births and deaths in the populations of a ``BirthDeathOptimizer``, in any training loop."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_meanfield.record.birth_record import COUNTS, BirthRecord
from torch_meanfield.width import BirthDeathOptimizer, Event

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class BirthRecorder:
    """Record the events of one or several optimizers, and the populations as the events came.

    Tensors are read from the device only at events.

    Args:
        *optimizers: whose events are followed, from now until :meth:`close`.
        records: records by the population's name, to be continued after a resumed training.

    Attributes:
        records: by the population's name, what was recorded.
        taken: the optimizer steps taken so far, as :meth:`before_step` was told.

    Example:
        >>> from torch_meanfield import BirthDeathOptimizer
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
        >>> optimizer = BirthDeathOptimizer(
        ...     torch.optim.SGD(model.parameters(), lr=0.1), model, example_input=torch.randn(2, 4),
        ...     every=5, reinject=0.25,
        ... )
        >>> with BirthRecorder(optimizer) as recorder:
        ...     for step in range(1, 11):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(8, 4)).square().mean().backward()
        ...         recorder.before_step(step)
        ...         _ = optimizer.step()
        >>> (record,) = recorder.records.values()
        >>> record.steps, sum(record.born) == recorder.killed > 0, len(record.potentials)
        ([5, 10], True, 16)

        A picture is drawn by :func:`.plot_births`: ``plot_births(recorder.records).savefig("births.png")``.
    """

    def __init__(self, *optimizers: BirthDeathOptimizer, records: Mapping[str, BirthRecord] | None = None) -> None:
        self.optimizers, self.records = optimizers, dict(records or {})
        self.taken = 0
        self._names: dict[int, str] = {}  # by the population's identity
        self._noted: dict[int, int] = {}  # by the optimizer's identity, its clock when it was last written down
        self._handles = [o.register_event_hook(partial(self._count, o)) for o in optimizers]

    def before_step(self, step: int, optimizer: Optimizer | None = None) -> None:
        """Note how the populations are, if the step that comes next ends in an event.

        Args:
            step: the number of that step; the first one is 1.
            optimizer: which optimizer steps; ``None``: all do.
        """
        self.taken = step - 1
        for each in self.optimizers:
            if (optimizer is None or optimizer is each) and _event_is_due(each):
                self._note(each)

    def _note(self, optimizer: BirthDeathOptimizer) -> None:
        self._noted[id(optimizer)] = optimizer.clock
        for population, (potentials, dead) in zip(optimizer.populations, _averages(optimizer), strict=True):
            record = self.records.setdefault(self._name(population), BirthRecord(population.size))
            record.due(self.taken + 1, int(dead.sum()), potentials.tolist())

    def _name(self, population: Any) -> str:
        """The name under which ``population`` is recorded: its own, numbered if another one has it already."""
        if id(population) not in self._names:
            name, number, taken = population.name, 1, set(self._names.values())
            while name in taken:
                number += 1
                name = f"{population.name} ({number})"
            self._names[id(population)] = name
        return self._names[id(population)]

    def _count(self, optimizer: BirthDeathOptimizer, event: Event) -> None:
        if self._noted.get(id(optimizer)) not in (event.step - 1, event.step):
            # Populations found in this very step, or a step that was not announced: averages of after it.
            self._note(optimizer)
        self.records[self._name(event.population)].happened(event.index, event.born)

    def metrics(self) -> dict[str, float]:
        """What was recorded so far as plain numbers, for a logger; empty if nothing was.

        ``birth_death/COUNT/POPULATION`` and ``birth_death/COUNT/total``, where COUNT is ``killed``, ``born``,
        ``cloned`` or ``events``, since the start; ``birth_death/dead/POPULATION`` at the last event.
        """
        if not self.records:
            return {}
        values = {f"birth_death/dead/{name}": float(r.dead[-1]) for name, r in self.records.items()}
        counts = {count: {n: sum(getattr(r, count)) for n, r in self.records.items()} for count in COUNTS}
        counts["events"] = {n: sum(k > 0 for k in r.killed) for n, r in self.records.items()}
        for count, each in counts.items():
            values |= {f"birth_death/{count}/{name}": float(n) for name, n in each.items()}
            values[f"birth_death/{count}/total"] = float(sum(each.values()))
        return values

    def potentials(self) -> dict[str, Tensor]:
        """The averaged potentials before the last event by population, each of shape ``(n,)``, on the CPU."""
        return {name: torch.tensor(record.potentials, device="cpu") for name, record in self.records.items()}

    def quantiles(self) -> dict[str, float]:
        """Quantiles of :meth:`potentials`: ``potential/POPULATION/q05`` to ``q95``."""
        at = torch.tensor(QUANTILES, device="cpu")
        return {
            f"potential/{name}/q{round(100 * q):02d}": v
            for name, row in self.potentials().items()
            for q, v in zip(QUANTILES, row.quantile(at).tolist(), strict=True)
        }

    @property
    def last(self) -> int:
        """The step of the last event that was due; -1 if none was yet."""
        return max((record.steps[-1] for record in self.records.values() if record.steps), default=-1)

    @property
    def killed(self) -> int:
        """Units that have died since the start, in all populations."""
        return sum(sum(record.killed) for record in self.records.values())

    def close(self) -> None:
        """Stop following; what was recorded stays."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> BirthRecorder:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _event_is_due(optimizer: BirthDeathOptimizer) -> bool:
    settings = optimizer.settings
    due = optimizer.enabled and settings.active and (optimizer.clock + 1) % settings.steps_between == 0
    return due and bool(optimizer.populations)


def _averages(optimizer: BirthDeathOptimizer) -> list[tuple[Tensor, Tensor]]:
    """The averaged potentials of each population and which of its units are dormant, both ``(n,)`` on the CPU."""
    each = zip(optimizer.potentials().values(), optimizer.dormant().values(), strict=True)
    read = (torch.stack([potentials, dormant.to(potentials.dtype)]).cpu() for potentials, dormant in each)
    return [(potentials, dormant) for potentials, dormant in read]
