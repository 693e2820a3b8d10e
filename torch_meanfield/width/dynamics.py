"""The dynamics of several populations: averages read at every step, and one event every so many steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_meanfield.particles import transport_
from torch_meanfield.particles.averages import lineage_of
from torch_meanfield.width import rates
from torch_meanfield.width.births import steep_values
from torch_meanfield.width.capture import Recorder, site_of
from torch_meanfield.width.laws import Initializer, laws_of
from torch_meanfield.width.neurons import Neurons
from torch_meanfield.width.newborns import draw, place_, split_
from torch_meanfield.width.potentials import Averages
from torch_meanfield.width.rates import Turnover
from torch_meanfield.width.rows import places_of
from torch_meanfield.width.settings import Settings


@dataclass(frozen=True, eq=False)
class Event:
    """What one event did to one population, published after it was done.

    Attributes:
        population: whose units.
        index: int64 ``(n,)``: place i took over what place ``index[i]`` held; newborn units have their own place here.
        born: int64 ``(k,)``: the places that hold newborn units now.
        step: the number of optimizer steps taken.
    """

    population: Neurons
    index: Tensor
    born: Tensor
    step: int


class Dynamics:
    """Populations, their averaged potentials, a clock and a generator.

    Args:
        populations: checked, see :mod:`torch_meanfield.width.declared`.
        model: where their layers are found, for the initialisers and for steep placement.
        settings: checked.
        generator: on the CPU; the only source of randomness, so that all ranks draw alike.
        initializer: the user's law for incoming weights, or ``None``.
    """

    def __init__(
        self,
        populations: Sequence[Neurons],
        model: nn.Module | None,
        settings: Settings,
        generator: torch.Generator,
        initializer: Initializer | None,
    ) -> None:
        self.populations, self.settings = list(populations), settings
        self.generator, self.initializer = generator, initializer
        self.laws = [laws_of(p, model) for p in self.populations]
        by_device: dict[torch.device, list[int]] = {}
        for i, p in enumerate(self.populations):
            by_device.setdefault(p.outgoing[0].tensor.device, []).append(i)
            if p.owner is not None:
                lineage_of(p.owner)  # averaged copies made from now on are known to be such
        self.averages = [Averages([self.populations[i] for i in ids], settings.window) for ids in by_device.values()]
        self.where = {
            i: (a, j) for a, ids in zip(self.averages, by_device.values(), strict=True) for j, i in enumerate(ids)
        }
        self.elapsed: list[Any] = [0.0 for _ in self.populations]  # learning rates since the last event
        self.recorders: dict[int, Recorder] = {}
        if settings.steep and settings.births == "reinject" and initializer is None:
            for i, p in enumerate(self.populations):
                site = site_of(p, model)
                if site is not None:
                    self.recorders[i] = Recorder(site, settings.rows, settings.recorded)

    # -- every step --------------------------------------------------------------------------------------------

    def read(self, optimizer: Optimizer) -> None:
        """Take in the potentials of this step, before the parameters move."""
        for averages in self.averages:
            averages.read(getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None))

    def advance(self, optimizer: Optimizer) -> None:
        """Let the time of the exact scheme pass by one step's learning rate."""
        if self.settings.scheme != "exact":
            return
        rate = {id(p): group.get("lr", 0.0) for group in optimizer.param_groups for p in group["params"]}
        for i, population in enumerate(self.populations):
            self.elapsed[i] = self.elapsed[i] + rate.get(id(population.outgoing[0].tensor), 0.0)

    def watch(self, clock: int) -> None:
        """Have the landscape recorded over the last steps before an event."""
        if not self.recorders:
            return
        begins = (clock + self.settings.recorded) % self.settings.every == 0
        for i, recorder in self.recorders.items():
            if begins and not frozen(self.populations[i]):
                recorder.start()
            else:
                recorder.resume()

    def begin_anew(self) -> None:
        """Forget averages, time and what has been recorded: what was loaded says nothing of them."""
        for averages in self.averages:
            averages.table.zero_()
        self.elapsed = [0.0 for _ in self.populations]
        for recorder in self.recorders.values():
            recorder.stop()

    # -- every so many steps -----------------------------------------------------------------------------------

    @torch.no_grad()
    def event(self, optimizer: Optimizer, clock: int) -> list[Event]:
        """Kill and give birth in every population. One read from the device, for all of them together."""
        decisions = {i: self._decide(i) for i, p in enumerate(self.populations) if not frozen(p)}
        counts = self._read_counts(decisions)
        events = []
        for (i, turnover), (moved, born, harmful) in zip(decisions.items(), counts, strict=True):
            self.elapsed[i] = 0.0
            if moved:
                events.append(self._carry_out(i, turnover, moved, born, harmful, optimizer, clock))
        for recorder in self.recorders.values():
            recorder.stop()
        return events

    def _decide(self, i: int) -> Turnover:
        s, (averages, j) = self.settings, self.where[i]
        n, device = self.populations[i].size, averages.device
        mean, coherence, mature = averages.mean(j), averages.coherence(j), averages.mature(j)
        if s.scheme == "exact":
            # A unit that has not been watched yet stands where the others are on average.
            mean = torch.where(mature, mean, torch.where(mature, mean, 0).sum() / mature.sum().clamp_min(1))
            draws = self._uniform((4, n), device, mean.dtype)
            turnover = rates.exact(mean, s.rate * self.elapsed[i], draws, fresh=s.births == "reinject")
        else:
            quiet = averages.of(j)[3]
            harmful, dead = rates.standing_out(mean, coherence, mature, quiet, s.rate, s.coherence, s.window)
            if not s.rate:
                harmful, dead = torch.zeros_like(harmful), torch.zeros_like(dead)
            if s.births == "reinject":
                turnover = rates.reborn(harmful, dead)
            else:
                good = mature & (coherence < -s.coherence)
                turnover = rates.from_parents(harmful, dead, good, self._uniform((n,), device, mean.dtype))
        if s.reinject:
            turnover = rates.add_reinjection(turnover, s.reinject, self._uniform((n,), device, mean.dtype))
        return turnover

    def _read_counts(self, decisions: dict[int, Turnover]) -> list[list[int]]:
        """How much there is to do, nothing if this step was skipped or a gradient is not finite: the one read."""
        if not decisions:
            return []
        device = self.averages[0].device
        fine = torch.stack([a.ok.to(device) for a in self.averages]).all()
        grads = [c.tensor.grad for i in decisions for c in _slices(self.populations[i]) if c.tensor.grad is not None]
        if grads:
            fine = fine & torch.stack([g.sum().isfinite().to(device) for g in grads]).all()
        counts = torch.stack([t.counts().to(device) for t in decisions.values()])
        out: list[list[int]] = (counts * fine).tolist()
        return out

    def _carry_out(
        self, i: int, turnover: Turnover, moved: int, born: int, harmful: int, optimizer: Optimizer, clock: int
    ) -> Event:
        population, (averages, j) = self.populations[i], self.where[i]
        if moved > born:
            transport_(population, turnover.index, optimizers=[optimizer], cause="birth_death")
            averages.move_(j, turnover.index)
            if self.settings.births == "split":
                split_(population, turnover.index, self.settings.jitter, self._on(averages.device))
        # the replaced harmful units first: they get weight at once, see steep_values
        places = torch.cat(
            [places_of(turnover.harmful, harmful), places_of(turnover.born & ~turnover.harmful, born - harmful)]
        )
        if born:
            generator = self._on(averages.device)
            values = draw(population, self.laws[i], born, generator, self.initializer)
            if i in self.recorders:
                steep_values(population, self.recorders[i], self.laws[i], values, harmful, self.settings, generator)
            place_(population, places, values, [optimizer])
            averages.forget_(j, places)
        return Event(population, turnover.index, places, clock)

    def _uniform(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Uniform draws on [0, 1), the same ones on every device."""
        return torch.rand(shape, generator=self.generator, dtype=dtype).to(device)

    def _on(self, device: torch.device) -> torch.Generator:
        """A generator on ``device``, seeded from ours: large draws are made where they are used."""
        seed = int(torch.randint(2**62, (1,), generator=self.generator))
        return torch.Generator(device).manual_seed(seed)


def frozen(population: Neurons) -> bool:
    """Whether one of its parameters is not being trained: then nothing may change in it."""
    return any(isinstance(c.tensor, nn.Parameter) and not c.tensor.requires_grad for c in _slices(population))


def _slices(population: Neurons) -> Sequence[Any]:
    return population.slices(population.columns)


Callback = Callable[[Event], None]
