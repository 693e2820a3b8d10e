"""The dynamics of several populations: averages read at every step, and one event every so many steps."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_meanfield.particles import place_, transport_
from torch_meanfield.particles.averages import adopt_averages, lineage_of
from torch_meanfield.particles.copying import whole
from torch_meanfield.particles.neurons import Neurons
from torch_meanfield.particles.ranks import check_alike, world
from torch_meanfield.particles.slices import places_of
from torch_meanfield.width.births.initialisers import Initializer, laws_of
from torch_meanfield.width.births.newborns import draw, split_
from torch_meanfield.width.births.recorder import Recorder, site_of
from torch_meanfield.width.births.steep_births import steep_values
from torch_meanfield.width.optimizer.settings import Settings
from torch_meanfield.width.turnover import rates
from torch_meanfield.width.turnover.batch_size import BatchCounter, seen_at
from torch_meanfield.width.turnover.blocks import Blocks
from torch_meanfield.width.turnover.carried import carry
from torch_meanfield.width.turnover.current import names_of, renewed
from torch_meanfield.width.turnover.potentials import Averages, read_from
from torch_meanfield.width.turnover.rates import Turnover


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


class Dynamics:
    """Populations, their averaged potentials, a clock and a generator.

    Args:
        populations: checked, see :mod:`torch_meanfield.width.optimizer.declared`.
        model: where their layers are found, for the initialisers and for steep placement.
        settings: checked.
        generator: on the CPU; the only source of randomness, so that all ranks draw alike.
        initializer: the user's law for incoming weights, or ``None``.
    """

    def __init__(
        self,
        populations: Sequence[Neurons | Blocks],
        model: nn.Module | None,
        settings: Settings,
        generator: torch.Generator,
        initializer: Initializer | None,
    ) -> None:
        self.populations, self.settings = list(populations), settings
        self._names = names_of(self.populations)
        self.generator, self.initializer = generator, initializer
        self.laws = [laws_of(p, model) if isinstance(p, Neurons) else {} for p in self.populations]
        by_device: dict[torch.device, list[int]] = {}
        for i, p in enumerate(self.populations):
            by_device.setdefault(read_from(p).device, []).append(i)
            if p.owner is not None:
                lineage_of(p.owner)  # averaged copies made from now on are known to be such
        for owner in {id(p.owner): p.owner for p in self.populations if p.owner is not None}.values():
            adopt_averages(owner)  # and those made before
        self.averages = [Averages([self.populations[i] for i in ids], settings.window) for ids in by_device.values()]
        self.where = {
            i: (a, j) for a, ids in zip(self.averages, by_device.values(), strict=True) for j, i in enumerate(ids)
        }
        self.batch = BatchCounter(seen_at(self.populations, model), settings.batch_size)
        self._warned: set[str] = set()
        self.elapsed: list[Any] = [0.0 for _ in self.populations]  # learning rates since the last event
        self.recorders: dict[int, Recorder] = {}
        if settings.steep and settings.births == "reinject" and initializer is None:
            for i, p in enumerate(self.populations):
                site = site_of(p, model) if isinstance(p, Neurons) else None
                if site is not None:
                    self.recorders[i] = Recorder(site, settings.rows, settings.recorded)
        carry(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        carry(self)

    def averages_of(self, i: int) -> Tensor:
        """What is known of population i: the rows of :class:`Averages`, a view of shape ``(4, n)``."""
        averages, j = self.where[i]
        return averages.of(j)

    # -- every step --------------------------------------------------------------------------------------------

    def read(self, optimizer: Optimizer) -> None:
        """Take in the potentials of this step, before the parameters move."""
        self.batch.step()
        for recorder in self.recorders.values():
            recorder.take()
        for averages in self.averages:
            if averages.follow_device_():  # what was recorded lies where the model was
                for recorder in self.recorders.values():
                    recorder.restart()
            averages.read(getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None))

    def forget_step(self) -> None:
        """The gradients of the present step are thrown away: so is what was recorded beside them."""
        self.batch.forget()
        for recorder in self.recorders.values():
            recorder.forget()

    def advance(self, optimizer: Optimizer) -> None:
        """Let the time of the exact scheme pass by one step's learning rate."""
        if self.settings.scheme != "exact":
            return
        rate = {id(p): group.get("lr", 0.0) for group in optimizer.param_groups for p in group["params"]}
        for i, population in enumerate(self.populations):
            self.elapsed[i] = self.elapsed[i] + rate.get(id(read_from(population)), 0.0)

    def watch(self, clock: int) -> None:
        """Have the landscape recorded over the last steps before an event."""
        begins = (clock + self.settings.recorded) % self.settings.every == 0
        if begins:
            self.batch.start()
        else:
            self.batch.resume()
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
        self.batch.stop()

    # -- every so many steps -----------------------------------------------------------------------------------

    @torch.no_grad()
    def event(self, optimizer: Optimizer, clock: int) -> list[Event]:
        """Kill and give birth in every population. One read from the device, for all of them together.

        Raises:
            ValueError: a parameter of a population was replaced in the model. Nothing has been changed then.
        """
        self.populations = renewed(self.populations, self._names)
        batch = self.batch.size() if self.settings.scheme == "standing_out" else None
        awake = [i for i, p in enumerate(self.populations) if not frozen(p)]
        if awake and batch is None and self.settings.scheme == "standing_out" and self.settings.rate:
            self._warn_once(
                "BirthDeathOptimizer does not know how many samples a step has (it has no model=, or one that is "
                "compiled or run under vmap), so no unit is replaced as harmful, only dead ones are; pass batch_size="
            )
        self._check_owned([self.populations[i] for i in awake], optimizer)
        decisions = {i: self._decide(i, batch) for i in awake}
        counts = self._read_counts(decisions)
        self._check_alike(counts, clock)
        events = []
        due = list(zip(decisions.items(), counts, strict=True))
        # blocks last: what was decided of the neurons inside them is told by place
        due.sort(key=lambda entry: isinstance(self.populations[entry[0][0]], Blocks))
        for (i, turnover), (moved, born, harmful, _) in due:
            self.elapsed[i] = 0.0
            if moved:
                events.append(self._carry_out(i, turnover, moved, born, harmful, optimizer, clock))
        for recorder in self.recorders.values():
            recorder.stop()
        self.batch.stop()
        return events

    @staticmethod
    def _check_owned(populations: Sequence[Neurons | Blocks], optimizer: Optimizer) -> None:
        """See that what a block owns now is what the optimizer trains: under FSDP2 it may be a gathered copy."""
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for population in populations:
            if isinstance(population, Blocks) and id(population.position) not in owned:
                raise RuntimeError(
                    f"{population.name}: its parameters are not those that the optimizer trains. FSDP2 leaves them "
                    f"gathered after a forward pass without a backward pass; call reshard() of the sharded model "
                    f"before optimizer.step()"
                )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _decide(self, i: int, batch: float | None) -> Turnover:
        s, (averages, j) = self.settings, self.where[i]
        blocks = isinstance(self.populations[i], Blocks)  # they are cloned: nothing could be drawn in their place
        n, device = self.populations[i].size, averages.device
        mean, coherence, mature = averages.mean(j), averages.coherence(j), averages.mature(j)
        if s.scheme == "exact":
            # A unit that has not been watched yet stands where the others are on average.
            mean = torch.where(mature, mean, torch.where(mature, mean, 0).sum() / mature.sum().clamp_min(1))
            draws = self._uniform((4, n), device, mean.dtype)
            turnover = rates.exact(mean, s.rate * self.elapsed[i], draws, fresh=s.births == "reinject" and not blocks)
        else:
            quiet = averages.of(j)[3]
            removal = torch.ones_like(mean) if batch is None else rates.removal(mean, averages.square(j), batch)
            harmful, dead = rates.standing_out(mean, coherence, mature, quiet, removal, s.rate, s.coherence, s.window)
            if not s.rate:
                harmful, dead = torch.zeros_like(harmful), torch.zeros_like(dead)
            if s.births == "reinject" and not blocks:
                turnover = rates.reborn(harmful, dead)
            else:
                good = mature & (coherence < -s.coherence)
                turnover = rates.from_parents(harmful, dead, good, self._uniform((n,), device, mean.dtype))
        if s.reinject and not blocks:
            turnover = rates.add_reinjection(turnover, s.reinject, self._uniform((n,), device, mean.dtype))
        return turnover

    def _read_counts(self, decisions: dict[int, Turnover]) -> list[list[int]]:
        """How much there is to do, nothing if this step was skipped or a gradient is not finite: the one read.

        For each population the three counts of :meth:`.Turnover.counts`, and :meth:`.Turnover.checksum`.
        """
        if not decisions:
            return []
        device = self.averages[0].device
        fine = torch.stack([a.ok.to(device) for a in self.averages]).all()
        grads = [t.grad for i in decisions for t in _tensors(self.populations[i]) if t.grad is not None]
        if grads:
            fine = fine & torch.stack([whole(g.sum()).isfinite().to(device) for g in grads]).all()
        counts = torch.stack([torch.cat([t.counts(), t.checksum()[None]]).to(device) for t in decisions.values()])
        out: list[list[int]] = (counts * fine).tolist()
        return out

    def _check_alike(self, counts: list[list[int]], clock: int) -> None:
        """See that all ranks have decided the same, and will draw the same."""
        if world()[1] == 1:
            return
        state = self.generator.get_state()
        check_alike(
            {
                "the number of steps": clock,
                "a setting": self.settings,
                "the state of its generator": zlib.crc32(bytes(state.tolist())),
                "a population": [(p.name, p.size) for p in self.populations],
                "the law that newborn units are drawn from": self.laws,
                "what the potentials say": counts,
            }
        )

    def _carry_out(
        self, i: int, turnover: Turnover, moved: int, born: int, harmful: int, optimizer: Optimizer, clock: int
    ) -> Event:
        population, (averages, j) = self.populations[i], self.where[i]
        if isinstance(population, Blocks):
            index = population.resample_(turnover.index, [optimizer])  # the averages follow its motion: see carry
            return Event(population, index, index.new_empty(0), clock)
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
                # in the very first step, populations are found when its forward pass has been made already
                watched = self.recorders[i].wanted and self.recorders[i].steps > 1
                if watched and not any(r.inputs for r in self.recorders.values()):
                    self._warn_once(
                        "BirthDeathOptimizer has seen nothing of the loss around its units (the model is compiled or "
                        "run under vmap, or an activation checkpoint parts their layers), so newborn units are drawn, "
                        "not placed where the loss is steep; steep=False says that this is meant"
                    )
                steep_values(population, self.recorders[i], self.laws[i], values, harmful, self.settings, generator)
            place_(population, places, values, optimizers=[optimizer], cause="birth_death")
            averages.forget_(j, places)
        return Event(population, turnover.index, places, clock)

    def _uniform(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Uniform draws on [0, 1), the same ones on every device."""
        return torch.rand(shape, generator=self.generator, dtype=dtype, device=self.generator.device).to(device)

    def _on(self, device: torch.device) -> torch.Generator:
        """A generator on ``device``, seeded from ours: large draws are made where they are used."""
        seed = int(torch.randint(2**62, (1,), generator=self.generator, device=self.generator.device))
        return torch.Generator(device).manual_seed(seed)


def frozen(population: Neurons | Blocks) -> bool:
    """Whether one of its parameters is not being trained: then nothing may change in it."""
    return any(isinstance(t, nn.Parameter) and not t.requires_grad for t in _tensors(population))


def _tensors(population: Neurons | Blocks) -> list[Tensor]:
    if isinstance(population, Blocks):
        return population.parameters()
    return [c.tensor for c in population.slices(population.columns)]


Callback = Callable[[Event], None]
