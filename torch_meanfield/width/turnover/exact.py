"""The scheme of the theory: birth and death at the rates that the potentials give, the population kept exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_meanfield.particles.slices import places_of
from torch_meanfield.width.turnover.decide import Evidence, Turnover, TurnoverRule, Uniform


@dataclass(frozen=True)
class Exact(TurnoverRule):
    """``scheme="exact"``: see :func:`birth_and_death`.

    Args:
        rate: alpha, per unit of the sum of learning rates.
    """

    rate: float

    births = "clone"
    keeps_time = True

    def window(self, every: int) -> float:
        """The potentials of the last step alone, as the theory has it."""
        return 1.0

    def decide(self, seen: Evidence, inherits: bool, uniform: Uniform) -> Turnover:
        """See :meth:`.TurnoverRule.decide`."""
        n, mature = seen.mean.numel(), seen.mature
        # A unit that has not been watched yet stands where the others are on average.
        mean = torch.where(mature, seen.mean, torch.where(mature, seen.mean, 0).sum() / mature.sum().clamp_min(1))
        return birth_and_death(mean, self.rate * seen.elapsed, uniform(4, n), fresh=not inherits)


def birth_and_death(potential: Tensor, rate_dt: Tensor | float, draws: Tensor, *, fresh: bool = False) -> Turnover:
    r"""Birth and death at the rates of the theory, the population kept exactly.

    .. math:: \partial_t \mu = -\alpha\,(V - \bar V)\,\mu

    over a time dt: a unit with :math:`V_i > \bar V` is killed with probability
    :math:`1 - \exp(-\alpha (V_i - \bar V)\,dt)`, one with :math:`V_i < \bar V` is cloned with probability
    :math:`1 - \exp(-\alpha (\bar V - V_i)\,dt)`. Then, if there are more than n units, as many of them (survivors and
    clones alike) are removed at random, and if there are fewer, random ones are cloned. Survivors keep their place,
    the dead take the index of a clone.

    Args:
        potential: averaged potentials, shape ``(n,)``.
        rate_dt: alpha times the time that has passed (with the factor of :func:`.potential`, see there).
        draws: uniform random numbers, shape ``(4, n)``.
        fresh: the dead are replaced by units drawn anew, and nothing is cloned.

    Returns:
        the turnover; no value is read back to the host.

    Source: Rotskoff 2020, (34) and (37); Rotskoff et al. 2019, Algorithm 1.
    """
    n = potential.numel()
    excess = potential - potential.mean()
    acts = draws[0] < -torch.expm1(-(excess * rate_dt).abs())
    killed, cloned = acts & (excess > 0), acts & (excess < 0)
    places = torch.arange(n, device=potential.device)
    if fresh:
        return Turnover(places, killed, killed)
    # The pool: survivors, then clones. A random order of it; the first n stay.
    member = torch.cat([~killed, cloned])
    order = torch.where(member, torch.cat([draws[1], draws[2]]), 2.0).argsort()
    total = member.sum()
    stays = torch.zeros_like(member).index_fill_(0, order[:n], True) & member
    # If the pool is too small, the last of the n entries in that order are not members: random ones stand in.
    stand_in = order[(draws[3] * total).long().clamp_max_(total - 1)] % n
    beyond = places >= total
    sources = torch.where(beyond, stand_in, order[:n] % n)
    # Survivors that stay keep their place; what is left of the n sources fills the vacancies in random order.
    survivor = stays[:n]
    vacant, fill = places_of(~survivor, n), places_of(beyond | (order[:n] >= n), n)
    # vacancies and extra sources are equally many: n places, each either kept by a survivor or filled
    slot = torch.where(places < (~survivor).sum(), vacant, n)
    index = torch.cat([places, places.new_zeros(1)]).scatter(0, slot, sources[fill])[:n]
    none = torch.zeros_like(killed)
    return Turnover(index, none, none)
