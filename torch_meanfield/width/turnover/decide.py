"""What a scheme decides at an event: who dies, whose place is taken by whom, and the one protocol that schemes have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from torch_meanfield.particles.newborn_state import MOMENT_SHARE
from torch_meanfield.particles.slices import places_of

Uniform = Callable[..., Tensor]


@dataclass(frozen=True)
class Evidence:
    """What is known of the n units of one population when an event comes; every tensor has shape ``(n,)``.

    Attributes:
        mean: averaged potentials; 0 where nothing has been seen.
        square: averaged squares of the potentials.
        quiet: the number of steps in a row at which the potential was exactly 0.
        age: the number of steps over which the unit has been watched.
        fired: the number of those at which the potential was not 0.
        window: length of the averages in steps.
        batch_size: samples of which a step's gradient is the mean, over all ranks; ``None`` if it is not known.
        elapsed: sum of the learning rates since the last event, for schemes that keep time.
        outgoing: gives :attr:`reach`.
    """

    mean: Tensor
    square: Tensor
    quiet: Tensor
    age: Tensor
    fired: Tensor
    window: float
    batch_size: float | None = None
    elapsed: Tensor | float = 0.0
    outgoing: Callable[[], Tensor | None] | None = None

    @property
    def reach(self) -> Tensor | None:
        """The most that each potential could be at this step, see :meth:`.Outgoing.reach`; ``None``: not known.

        It is not known of blocks, and without a gradient.
        """
        return None if self.outgoing is None else self.outgoing()

    @property
    def mature(self) -> Tensor:
        """Which units have been watched for a window's length; bool."""
        return self.age >= self.window

    @property
    def dormant(self) -> Tensor:
        """Which units reached nothing at any step of a window (ReLUs that never fire); bool."""
        return self.mature & (self.quiet >= self.window)

    @property
    def coherence(self) -> Tensor:
        """Averaged potential over its root mean square, in [-1, 1]: 1 if it never changed, near 0 if it is noise."""
        return self.mean / self.square.sqrt().clamp_min(torch.finfo(self.mean.dtype).tiny)


@dataclass(frozen=True)
class Turnover:
    """What one event does to the n places of a population; everything stays on the device.

    Attributes:
        index: int64 ``(n,)``: place i takes what place ``index[i]`` holds; survivors keep their place.
        born: bool ``(n,)``: places that receive a unit drawn anew instead (there ``index[i] == i``).
        harmful: bool ``(n,)``: those among ``born`` whose predecessor had a function, which the newborn may replace.
    """

    index: Tensor
    born: Tensor
    harmful: Tensor

    def counts(self) -> Tensor:
        """Three integers ``(3,)``: places that change hands, newborns, and harmful units among those replaced."""
        places = torch.arange(self.index.numel(), device=self.index.device)
        moved = (self.index != places) | self.born
        return torch.stack([moved.sum(), self.born.sum(), self.harmful.sum()])

    def checksum(self) -> Tensor:
        """One integer, ``()``, in which two turnovers of the same counts are all but sure to differ."""
        places = torch.arange(1, self.index.numel() + 1, device=self.index.device)
        mixed = places * (3 * self.index + 5 * self.born + 7 * self.harmful)
        return (mixed * mixed % 1_000_003).sum()


class TurnoverRule(Protocol):
    """A scheme: one class with one method. Pass an instance as ``BirthDeathOptimizer(..., scheme=...)``.

    Data-parallel ranks must decide alike: decide from ``seen`` and ``uniform`` alone, and read nothing back to the
    host. Make it a dataclass, so that ranks can compare its settings.

    Attributes:
        every: steps from one event to the next where the user does not say.
        births: the way of being born that goes with it where the user names none.
        needs_batch_size: whether :attr:`Evidence.batch_size` is to be known.
        counted: over how many steps before an event, at most, samples are counted for it.
        recounted: the number of events for which one count serves.
        keeps_time: whether :attr:`Evidence.elapsed` is to be known.
        spares_silent: whether a population that is dormant as a whole stays while no other parameter has a gradient
            either, and is told of when it goes.
        moment_share: at which share of their mean second moments begin for newborn units; see :func:`.place_`.
    """

    every: int = 200
    births: str = "reinject"
    needs_batch_size: bool = False
    counted: int = 40
    recounted: int = 1
    keeps_time: bool = False
    spares_silent: bool = False
    moment_share: float = MOMENT_SHARE

    def window(self, every: int) -> float:
        """Over how many steps potentials are averaged where the user does not say; half the time between events."""
        return max(1.0, every / 2)

    def dormant(self, seen: Evidence) -> Tensor:
        """Which units reach nothing, bool ``(n,)``: what :meth:`.BirthDeathOptimizer.dormant` shows."""
        return seen.dormant

    def old_enough(self, seen: Evidence) -> Tensor:
        """Which units have been watched for long enough to be judged, bool ``(n,)``."""
        return seen.mature

    def silence(self, batch_size: float | None) -> int | None:
        """The number of steps in a row at which a unit must have been silent before anything can happen to it.

        It spares frequent events their cost. ``None`` if silence alone does not tell: :meth:`decide` is always asked.
        """
        return None

    def decide(self, seen: Evidence, inherits: bool, uniform: Uniform) -> Turnover:
        """Say what happens to each place.

        Args:
            seen: what is known of the units.
            inherits: whether a vacant place is taken by the copy of another unit; otherwise by one drawn anew.
            uniform: ``uniform(*shape)`` gives draws on [0, 1), the same on all ranks.
        """
        ...


def reborn(harmful: Tensor, dormant: Tensor) -> Turnover:
    """Every unit that is to be replaced is replaced by one drawn anew; bool ``(n,)`` each."""
    places = torch.arange(harmful.numel(), device=harmful.device)
    return Turnover(places, harmful | dormant, harmful)


def from_parents(harmful: Tensor, dormant: Tensor, good: Tensor, draws: Tensor) -> Turnover:
    """Every unit that is to be replaced becomes a copy of a random one among ``good``; none is if none is good.

    Args:
        harmful, dormant, good: bool, shape ``(n,)``.
        draws: uniform random numbers, shape ``(n,)``.
    """
    n = harmful.numel()
    places = torch.arange(n, device=harmful.device)
    parents, count = places_of(good, n), good.sum()
    parent = parents[(draws * count).long().clamp_max_((count - 1).clamp_min(0))]
    replaced = (harmful | dormant) & (count > 0)
    none = torch.zeros_like(harmful)
    return Turnover(torch.where(replaced, parent, places), none, none)


def add_reinjection(turnover: Turnover, share: float, draws: Tensor) -> Turnover:
    """Replace each place, besides, with probability ``share`` by a unit drawn anew: what full support asks for."""
    chosen = draws < share
    places = torch.arange(chosen.numel(), device=chosen.device)
    # a place that is somebody's parent in this event may be overwritten all the same: transport comes first
    index = torch.where(chosen, places, turnover.index)
    return Turnover(index, turnover.born | chosen, turnover.harmful & ~chosen)
