"""The scheme for networks that must go on learning: units that reach nothing are replaced within a few steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_meanfield.width.turnover.decide import Evidence, Turnover, TurnoverRule, Uniform, from_parents, reborn

MATURE = 100  # steps after which a unit is judged by its use
WHOLE = 100  # times as many samples must pass before a population that is silent as a whole is taken for dormant


@dataclass(frozen=True)
class Plastic(TurnoverRule):
    r"""``scheme="plastic"``: replace units that reached nothing for ``dead_after`` samples, checked every 5 steps.

    Where tasks follow each other, dormant units pile up and networks lose the ability to learn (Dohare et al. 2024;
    Sokar et al. 2023). A unit that no sample of the last steps has reached (potential exactly 0) is replaced at once
    if that is not its way: a unit that fires on few samples is silent now and then, and is of use. If it fires at a
    share f of the steps, k silent ones in a row have the probability

    .. math:: (1 - f)^k \le \text{chance}, \qquad 1 - f = \frac{\text{silent} + 1}{\text{age} + 2}

    below which it is taken for dead, f being that of its own life up to its last firing (the test of self-normalised
    resets, Farias and Jozefiak 2025, by a geometric law). So a unit that fired at a thousand steps out of as many goes
    after two silent ones, one that fires at a tenth of them after 88, and one that never fired after ``dead_after``
    samples.

    Args:
        dead_after: samples that did not reach the unit, at least 1. Where the number of samples in a step is not
            known, each step counts as one.
        max_share: the largest share of a population that goes at once, those that were silent for longest first; in
            (0, 1]. At least one unit may always go, and a population that is dormant as a whole goes as a whole.
        chance: the probability, at the unit's own rate, of a silence that is taken for death, in (0, 1]; at 1 every
            silence of ``dead_after`` samples is.
        least_useful: the share of the units older than 100 steps that goes besides at each event, in [0, 1): those of
            the smallest :attr:`.Evidence.reach`, as continual backprop chooses (Dohare et al. 2024). For smooth
            activations (GELU, SiLU), whose units lose their use without ever falling silent; 0.005 was good. Units of
            use may be among them, and each event costs time: leave it at 0 for ReLUs.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    dead_after: int = 16
    max_share: float = 1.0
    chance: float = 1e-4
    least_useful: float = 0.0

    every = 5
    births = "typical"
    needs_batch_size = True
    counted = 1
    recounted = 20
    spares_silent = True
    moment_share = 0.003

    def __post_init__(self) -> None:
        if isinstance(self.dead_after, bool) or not isinstance(self.dead_after, int):
            raise TypeError(f"dead_after must be an integer, got {self.dead_after!r}")
        if self.dead_after < 1:
            raise ValueError(f"dead_after must be at least 1 sample, got {self.dead_after}")
        for name in ("max_share", "chance", "least_useful"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if name == "least_useful":
                if not 0 <= value < 1:
                    raise ValueError(f"least_useful must be at least 0 and below 1, got {value!r}")
            elif not 0 < value <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")

    def window(self, every: int) -> float:
        """Potentials are averaged for whoever looks at them; nothing is decided by them."""
        return 100.0

    def dormant(self, seen: Evidence) -> Tensor:
        """Which units reached nothing for ``dead_after`` samples and for longer than they usually do, bool ``(n,)``.

        Steps at which the whole population was silent say nothing of its units (an expert that got no sample, a loss
        that is 0), unless there were a hundred times as many. The first step of a newborn unit, whose outgoing weights
        are 0, says nothing either.
        """
        samples = 1.0 if seen.batch_size is None else seen.batch_size
        together = seen.quiet.amin()
        own = seen.quiet - together - ((seen.quiet == seen.age) & (together == 0)).to(seen.quiet.dtype)
        life = seen.age - seen.quiet  # up to the last firing
        rarity = ((life + 2) / (life - seen.fired + 1)).log()  # - log(1 - f)
        unusual = (own * rarity >= -math.log(self.chance)) | (seen.fired == 0)
        return ((own * samples >= self.dead_after) & unusual) | (together * samples >= WHOLE * self.dead_after)

    def silence(self, batch_size: float | None) -> int | None:
        """See :meth:`.TurnoverRule.silence`."""
        if self.least_useful:
            return None
        return math.ceil(self.dead_after / (1.0 if batch_size is None else batch_size))

    def old_enough(self, seen: Evidence) -> Tensor:
        """See :meth:`.TurnoverRule.old_enough`."""
        return seen.age * (1.0 if seen.batch_size is None else seen.batch_size) >= self.dead_after

    def decide(self, seen: Evidence, inherits: bool, uniform: Uniform) -> Turnover:
        """See :meth:`.TurnoverRule.decide`."""
        dormant, n = self.dormant(seen), len(seen.quiet)
        most = max(1, int(self.max_share * n))
        if most < n:  # ties in the order of places: alike on every device
            rank = torch.where(dormant, seen.quiet, -1).argsort(descending=True, stable=True)
            first = torch.zeros_like(dormant).index_fill_(0, rank[:most], True)
            dormant = dormant & (first | dormant.all())
        if self.least_useful:
            dormant = dormant | self._useless(seen, ~dormant, most - dormant.sum(), uniform)
        none = torch.zeros_like(dormant)
        if inherits:
            return from_parents(none, dormant, ~dormant & (seen.quiet == 0), uniform(n))
        return reborn(none, dormant)

    def _useless(self, seen: Evidence, living: Tensor, most: Tensor, uniform: Uniform) -> Tensor:
        """Which of the living units go because others are of more use, at most ``most``; bool ``(n,)``."""
        reach = seen.reach
        if reach is None:
            return torch.zeros_like(living)
        mature = living & (seen.age > MATURE)
        count = (self.least_useful * mature.sum() + uniform(1)).floor().clamp_max(most)  # the share on the average
        order = torch.where(mature, reach.to(seen.age.device), torch.inf).argsort(stable=True)
        return mature & (order.argsort() < count)
