"""Birth and death in several populations: what is read at every step, and when an event is due."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from torch_meanfield.particles import Motion, Neurons, subscribe
from torch_meanfield.particles.averages import adopt_averages, lineage_of
from torch_meanfield.particles.newborn_state import check_beginnings
from torch_meanfield.particles.optimizer_state import check_flat, check_state
from torch_meanfield.particles.population import tensors_of
from torch_meanfield.width.turnover.batch_size import BatchCounter, seen_at
from torch_meanfield.width.turnover.blocks import Blocks
from torch_meanfield.width.turnover.event import Event, Events
from torch_meanfield.width.turnover.motions import follow_
from torch_meanfield.width.turnover.potentials import Averages
from torch_meanfield.width.turnover.tracked import Tracked, TrackedBlocks, TrackedNeurons

RECORDED = 40  # over how many of the steps before an event, at most, what surrounds the units is recorded


class Dynamics:
    """Populations, what is known of them, and the events among them.

    Args:
        populations: checked, see :mod:`torch_meanfield.width.optimizer.declared`.
        model: where their layers are found, for the initialisers and for steep placement.
        events: holds them.
        every: steps from one event to the next.
        window: length of the averages in steps.
        batch_size: samples in a step, if the user said it.
    """

    def __init__(
        self,
        populations: Sequence[Neurons | Blocks],
        model: nn.Module | None,
        events: Events,
        *,
        every: int,
        window: float,
        batch_size: int | None,
    ) -> None:
        self.events, self.every = events, every
        self.tracked: list[Tracked] = [
            TrackedNeurons(p, model, events.births) if isinstance(p, Neurons) else TrackedBlocks(p) for p in populations
        ]
        self.recorders = [each.recorder for each in self.tracked if each.recorder is not None]
        self.averages = _seated(self.tracked, window)
        owners = {id(p.owner): p.owner for p in populations if p.owner is not None}.values()
        for owner in owners:
            lineage_of(owner)  # averaged copies made from now on are known to be such
        for owner in owners:
            adopt_averages(owner)  # and those made before
        self.batch = BatchCounter(seen_at(populations, model), batch_size)
        self._follow_motions()

    def _follow_motions(self) -> None:
        ours = weakref.ref(self)

        def on_motion(motion: Motion) -> None:
            alive = ours()
            if alive is not None:
                follow_(alive.tracked, motion)

        weakref.finalize(self, subscribe(on_motion).remove)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._follow_motions()

    def check_state(self, optimizer: Optimizer) -> None:
        """Raise ``TypeError`` if what ``optimizer`` keeps cannot be divided among the units."""
        for population in (each.population for each in self.tracked):
            check_flat(optimizer, tensors_of(population.columns), population.name)
            for column in population.columns:
                check_state(optimizer, column, population.name)
            if isinstance(population, Neurons) and (self.events.reinject or not self.events.births.inherits):
                check_beginnings(optimizer, tensors_of(population.columns))

    # -- every step --------------------------------------------------------------------------------------------

    def read(self, optimizer: Optimizer) -> None:
        """Take in the potentials of this step, before the parameters move."""
        self.batch.step()
        for recorder in self.recorders:
            recorder.take()
        for averages in self.averages:
            if averages.follow_device_():  # what was recorded lies where the model was
                for recorder in self.recorders:
                    recorder.restart()
            averages.read(getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None))

    def forget_step(self) -> None:
        """The gradients of the present step are thrown away: so is what was recorded beside them."""
        self.batch.forget()
        for recorder in self.recorders:
            recorder.forget()

    def step(self, optimizer: Optimizer, clock: int) -> list[Event]:
        """After the parameters have moved: let time pass, and hold an event if one is due."""
        if self.events.turnover.keeps_time:
            rate = {id(p): group.get("lr", 0.0) for group in optimizer.param_groups for p in group["params"]}
            for each in self.tracked:
                each.elapsed = each.elapsed + rate.get(id(each.reader.parameter), 0.0)
        return self.event(optimizer, clock) if clock % self.every == 0 else []

    def event(self, optimizer: Optimizer, clock: int) -> list[Event]:
        """Hold an event and end what was recorded for it; see :meth:`.Events.hold`."""
        events = self.events.hold(self.tracked, self.batch, optimizer, clock)
        for recorder in self.recorders:
            recorder.stop()
        self.batch.stop()
        return events

    def watch(self, clock: int) -> None:
        """Have what surrounds the units recorded over the last steps before an event."""
        rule = self.events.turnover
        period = self.every * (rule.recounted if self.batch.known else 1)
        if (clock + min(rule.counted, self.every)) % period == 0:
            self.batch.start()
        if (clock + min(RECORDED, self.every)) % self.every == 0:
            for each in self.tracked:
                if each.recorder is not None and not each.frozen():
                    each.recorder.start()
        self.resume()

    def resume(self) -> None:
        """Put hooks in place that should be and are not, after a copy or after loading."""
        self.batch.resume()
        for recorder in self.recorders:
            recorder.resume()

    def begin_anew(self) -> None:
        """Forget averages, time and what has been recorded: what was loaded says nothing of them."""
        for each in self.tracked:
            each.begin_anew()
        self.batch.stop()


def _seated(tracked: Sequence[Tracked], window: float) -> list[Averages]:
    """One table of averages for each device, with the populations that are there."""
    by_device: dict[torch.device, list[Tracked]] = {}
    for each in tracked:
        by_device.setdefault(each.reader.parameter.device, []).append(each)
    tables = []
    for together in by_device.values():
        tables.append(Averages([each.reader for each in together], window))
        for number, each in enumerate(together):
            each.sit_in(tables[-1], number)
    return tables
