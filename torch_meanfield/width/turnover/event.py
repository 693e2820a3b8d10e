"""The birth-death event: decide, read once how much there is to do, and let units die and be born."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_meanfield.particles import Neurons, place_, transport_
from torch_meanfield.particles.copying import whole
from torch_meanfield.particles.ranks import check_alike, of_any_rank, world
from torch_meanfield.particles.slices import places_of
from torch_meanfield.width.births.rule import BirthRule, Vacancies
from torch_meanfield.width.draws import Draws
from torch_meanfield.width.turnover.batch_size import BatchCounter
from torch_meanfield.width.turnover.blocks import Blocks
from torch_meanfield.width.turnover.decide import Turnover, TurnoverRule, add_reinjection
from torch_meanfield.width.turnover.tracked import Tracked, TrackedBlocks, TrackedNeurons, held_by

PATIENCE = 1000  # steps after which some unit must have been watched for long enough


@dataclass(frozen=True, eq=False)
class Event:
    """What one event did to one population, published after it was done.

    Attributes:
        population: whose units.
        index: int64 ``(n,)``: place i took over what place ``index[i]`` held; newborn units have their own place here.
        born: int64 ``(k,)``: the places that hold newborn units now.
        step: the number of optimizer steps taken.
    """

    population: Neurons | Blocks
    index: Tensor
    born: Tensor
    step: int


class Events:
    """Holds events by one set of rules.

    Args:
        turnover: who dies and whose place is taken by whom.
        births: what takes the place of the dead.
        reinject: share of the units that are replaced at random by units drawn anew, besides.
        draws: the source of randomness.
        moment_share: see :func:`.place_`.
        settings: what else all ranks must have alike.

    Attributes:
        batch_size: samples in a step when it was last asked for; ``None`` if it is not known.
    """

    def __init__(
        self,
        turnover: TurnoverRule,
        births: BirthRule,
        reinject: float,
        draws: Draws,
        moment_share: float | None = None,
        settings: object = None,
    ) -> None:
        self.turnover, self.births, self.reinject = turnover, births, reinject
        self.draws, self.settings = draws, settings
        self.moment_share = turnover.moment_share if moment_share is None else moment_share
        self.batch_size: float | None = None
        self._warned: set[str] = set()
        self._compared = False  # whether ranks were found to have the same settings and populations
        self._judged = False  # whether it was seen to that units grow old enough to be judged

    @torch.no_grad()
    def hold(self, tracked: Sequence[Tracked], batch: BatchCounter, optimizer: Optimizer, clock: int) -> list[Event]:
        """Kill and give birth in every population. One read from the device, for all of them together.

        Raises:
            ValueError: a parameter of a population was replaced in the model. Nothing has been changed then.
        """
        self.batch_size = batch_size = self._batch_size(batch, tracked)
        if not self._judged and clock >= PATIENCE:
            self._see_ages(tracked, clock)
        if self._nothing_due(tracked):
            return []
        awake = [each for each in tracked if not each.frozen()]
        _renew(tracked)
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for each in awake:
            each.check_owned(owned)
        decisions = [self._decide(each, batch_size) for each in awake]
        counts = _read_counts(awake, decisions)
        self._check_alike(tracked, counts, clock)
        due = list(zip(awake, decisions, counts, strict=True))
        # blocks last: what was decided of the neurons inside them is told by place
        due.sort(key=lambda entry: isinstance(entry[0], TrackedBlocks))
        seen = any(r.inputs for each in tracked if (r := each.recorder) is not None)
        events = []
        for each, turnover, (moved, born, harmful, _) in due:
            each.elapsed = 0.0
            whole = born == each.population.size and self.turnover.spares_silent
            if not moved or (whole and self._spared(each, optimizer)):
                continue
            if isinstance(each, TrackedBlocks):  # what is known of them follows the motion
                index = each.population.resample_(turnover.index, [optimizer])
                events.append(Event(each.population, index, index.new_empty(0), clock))
            elif isinstance(each, TrackedNeurons):
                self._warn_unseen(each, born, seen)
                places = self._carry_out(each, turnover, moved, born, harmful, optimizer)
                events.append(Event(each.population, turnover.index, places, clock))
        return events

    def _decide(self, each: Tracked, batch_size: float | None) -> Turnover:
        seen = each.evidence(batch_size)
        uniform = partial(self.draws.uniform, like=seen.mean)
        blocks = isinstance(each, TrackedBlocks)  # they are cloned: nothing could be drawn in their place
        turnover = self.turnover.decide(seen, self.births.inherits or blocks, uniform)
        if self.reinject and not blocks:
            turnover = add_reinjection(turnover, self.reinject, uniform(len(seen.mean)))
        return turnover

    def _carry_out(
        self, each: TrackedNeurons, turnover: Turnover, moved: int, born: int, harmful: int, optimizer: Optimizer
    ) -> Tensor:
        """Move what survives and is cloned, then place newborn units; their places, those of harmful units first."""
        population, index = each.population, turnover.index
        if moved > born:
            transport_(population, index, optimizers=[optimizer], cause="birth_death")
            each.move_(index)
            self.births.share_(population, index, self.draws)
        places = torch.cat(
            [places_of(turnover.harmful, harmful), places_of(turnover.born & ~turnover.harmful, born - harmful)]
        )
        if born:
            vacancies = Vacancies(population, each.initialisers, places, harmful, each.recorder)
            values = self.births.newborns(vacancies, self.draws)
            share = self.moment_share
            place_(population, places, values, optimizers=[optimizer], cause="birth_death", moment_share=share)
            each.forget_(places)
        return places

    def _nothing_due(self, tracked: Sequence[Tracked]) -> bool:
        """Whether one look at all populations, on all ranks, tells that nothing is to be decided."""
        steps = self.turnover.silence(self.batch_size)
        if self.reinject or steps is None or not (self._compared or world()[1] == 1):
            return False
        tables = {id(each.averages): each.averages for each in tracked}.values()
        silent = any(table.silent_for(steps) for table in tables)
        return not (of_any_rank(silent, tracked[0].averages.device) if tracked else silent)

    def _see_ages(self, tracked: Sequence[Tracked], clock: int) -> None:
        """Warn once if no unit is ever watched for long enough: then the scheme does nothing, and nobody would know."""
        awake = [each for each in tracked if not each.frozen()]
        if not awake:
            return
        self._judged = True
        if not any(bool(self.turnover.old_enough(each.evidence(self.batch_size)).any()) for each in awake):
            self._warn_once(
                f"BirthDeathOptimizer has seen no unit for long enough to judge it in {clock} steps, so none can be "
                f"replaced: steps are skipped, or the wait (dead_after=, window=) is longer than any unit lives"
            )

    def _spared(self, each: Tracked, optimizer: Optimizer) -> bool:
        """Whether a population that is dormant as a whole is kept: so if the loss says nothing to anybody else."""
        if not bool(self.turnover.dormant(each.evidence(self.batch_size)).all()):
            return False  # its units go for other reasons
        own = {id(t) for t in each.tensors()}
        others = (p.grad for group in optimizer.param_groups for p in group["params"] if id(p) not in own)
        if not any(g is not None and bool(g.any()) for g in others):
            return True
        self._warn_once(
            f"all {each.population.size} units of {each.name} are dormant and are born anew; the learning rate is the "
            f"likely cause: lower it, or warm it up"
        )
        return False

    def _batch_size(self, batch: BatchCounter, tracked: Sequence[Tracked]) -> float | None:
        if not self.turnover.needs_batch_size:
            return None
        size = batch.size()
        if size is None and not all(each.frozen() for each in tracked):
            self._warn_once(
                "BirthDeathOptimizer does not know how many samples a step has (it has no model=, or one that is "
                "compiled or run under vmap), so no unit is replaced as harmful, and dormant ones are after more steps "
                "than need be; pass batch_size="
            )
        return size

    def _check_alike(self, tracked: Sequence[Tracked], counts: list[list[int]], clock: int) -> None:
        """See that all ranks have decided the same, and will draw the same."""
        if world()[1] == 1:
            return
        check_alike(
            {
                "the number of steps": clock,
                "a setting": self.settings,
                "the state of its generator": self.draws.fingerprint(),
                "a population": [(each.name, each.population.size) for each in tracked],
                "what newborn units are drawn from": [each.initialisers for each in tracked],
                "what the potentials say": counts,
            }
        )
        self._compared = True

    def _warn_unseen(self, each: TrackedNeurons, born: int, seen: bool) -> None:
        # in the very first step, populations are found when its forward pass has been made already
        watched = each.recorder is not None and each.recorder.wanted and each.recorder.steps > 1
        if born and watched and not seen:
            self._warn_once(
                "BirthDeathOptimizer has seen nothing of the loss around its units (the model is compiled or "
                "run under vmap, or an activation checkpoint parts their layers), so newborn units are drawn, "
                "not placed where the loss is steep; steep=False says that this is meant"
            )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _renew(tracked: Sequence[Tracked]) -> None:
    """Let each population hold the tensors that the model holds now; all or none."""
    held = held_by(each.population for each in tracked)
    renewed: list[Any] = [each.renewed(held) for each in tracked]
    for each, population in zip(tracked, renewed, strict=True):
        each.population = population


def _read_counts(awake: Sequence[Tracked], decisions: Sequence[Turnover]) -> list[list[int]]:
    """How much there is to do, nothing if this step was skipped or a gradient is not finite: the one read.

    For each population the three counts of :meth:`.Turnover.counts`, and :meth:`.Turnover.checksum`.
    """
    if not awake:
        return []
    tables = {id(each.averages): each.averages for each in awake}.values()
    device = awake[0].averages.device
    fine = torch.stack([a.ok.to(device) for a in tables]).all()
    grads = [t.grad for each in awake for t in each.tensors() if t.grad is not None]
    if grads:
        fine = fine & torch.stack([whole(g.sum()).isfinite().to(device) for g in grads]).all()
    counts = torch.stack([torch.cat([t.counts(), t.checksum()[None]]).to(device) for t in decisions])
    out: list[list[int]] = (counts * fine).tolist()
    return out
