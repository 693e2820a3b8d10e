"""Who dies and who is born: the exact scheme of the theory, and the scale-free one for training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MARGIN = 10.0  # by which a removal's true cost may exceed what the noise says, see removal()


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


def exact(potential: Tensor, rate_dt: Tensor | float, draws: Tensor, *, fresh: bool = False) -> Turnover:
    r"""Birth and death at the rates of the theory, the population kept exactly.

    .. math:: \partial_t \mu = -\alpha\,(V - \bar V)\,\mu

    over a time dt: a unit with :math:`V_i > \bar V` is killed with probability
    :math:`1 - \exp(-\alpha (V_i - \bar V)\,dt)`, one with :math:`V_i < \bar V` is cloned with probability
    :math:`1 - \exp(-\alpha (\bar V - V_i)\,dt)`. Then, if there are more than n units, as many of them (survivors and
    clones alike) are removed at random, and if there are fewer, random ones are cloned. Survivors keep their place,
    the dead take the index of a clone.

    Args:
        potential: averaged potentials, shape ``(n,)``.
        rate_dt: alpha times the time that has passed (with the factor of ``potential``, see there).
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
    extra = beyond | (order[:n] >= n)
    vacant = _compress(~survivor)
    index = places.clone()
    fill = _compress(extra)
    # vacancies and extra sources are equally many: n places, each either kept by a survivor or filled
    count = (~survivor).sum()
    slot = torch.where(places < count, vacant, n)
    index = torch.cat([index, index.new_zeros(1)]).scatter(0, slot, sources[fill])[:n]
    nobody = torch.zeros_like(killed)
    return Turnover(index, nobody, nobody)


def standing_out(
    mean: Tensor,
    coherence: Tensor,
    mature: Tensor,
    quiet: Tensor,
    removal: Tensor,
    share: float,
    threshold: float,
    window: float,
) -> tuple[Tensor, Tensor]:
    r"""Who is to be replaced: the default, which needs no tuning from layer to layer.

    A unit is *harmful* if its averaged potential is positive (the loss falls as its outgoing weights shrink), if it
    stands out of its own noise, :math:`m_i > \kappa s_i` with m the average of the potential and s its root mean
    square (for pure noise the ratio is of the order :math:`\text{window}^{-1/2}` whatever the layer, the loss or the
    learning rate), and if the loss is expected to fall not only as it shrinks a little but when it is gone, see
    :func:`removal`. It is *dead* if its potential was exactly 0 at every step of a window: no gradient can wake it.

    Args:
        mean, coherence, mature, quiet: see :class:`.Averages`; shape ``(n,)``.
        removal: expected change of the loss when the unit is taken away, shape ``(n,)``.
        share: the largest share of the n units that may be replaced as harmful in one event, rounded down: a population
            of a few units (attention heads) loses none that works.
        threshold: kappa.
        window: length of the average in steps.

    Returns:
        (harmful, dead), bool of shape ``(n,)`` each, disjoint.
    """
    n = mean.numel()
    dead = mature & (quiet >= window)
    harmful = mature & ~dead & (coherence > threshold) & (mean > 0) & (removal < 0)
    most = int(share * n)
    if most == 0:
        return torch.zeros_like(harmful), dead
    if most < n:
        # the most harmful first, ties (clones) in the order of places: no sort, and alike on every device
        ranked = torch.where(harmful, mean, -torch.inf)
        least = ranked.kthvalue(n - most + 1).values
        above, ties = ranked > least, ranked == least
        harmful = harmful & (above | (ties & (ties.cumsum(0) <= most - above.sum())))
    return harmful, dead


def removal(mean: Tensor, square: Tensor, batch_size: float) -> Tensor:
    r"""The expected change of the loss when a unit's outgoing weights go to 0, to second order; shape ``(n,)``.

    .. math:: E(0) - E(1) \lesssim -V + \tfrac12 \cdot 10 H, \qquad
              H = E_r[v_r^2] \approx B\,\mathrm{Var}(V) + V^2

    in the scale of the outgoing weights. The curvature H is Fisher's (the loss taken as a negative log-likelihood):
    the mean square of what single samples r say, v_r, of which V is the mean over B; so the noise of V from step to
    step, times B, tells it. That is low for a network that fits its samples, and blind to what a batch norm behind the
    unit does when its statistics no longer hold: on a ResNet-8 on Fashion-MNIST the true cost of a removal was five to
    twenty times the estimate. Hence the factor 10; units worth replacing pass it easily, at a planted teacher by
    another factor of ten in the median. A useful unit near its best size has a small V of steady sign
    and a large H: at a low learning rate its potential stands out, and taking it away would cost.

    Args:
        mean, square: averages of V and of its square over steps, shape ``(n,)``, see
            :class:`.Averages`.
        batch_size: B, samples in a step.
    """
    noise = (square - mean.square()).clamp_min(0)
    return MARGIN * (batch_size * noise + mean.square()) / 2 - mean


def reborn(harmful: Tensor, dead: Tensor) -> Turnover:
    """Every unit that is to be replaced is replaced by one drawn anew."""
    places = torch.arange(harmful.numel(), device=harmful.device)
    return Turnover(places, harmful | dead, harmful)


def from_parents(harmful: Tensor, dead: Tensor, good: Tensor, draws: Tensor) -> Turnover:
    """Every unit that is to be replaced becomes a copy of a random one among ``good``; of nobody if there is none.

    Args:
        harmful, dead, good: bool, shape ``(n,)``.
        draws: uniform random numbers, shape ``(n,)``.
    """
    n = harmful.numel()
    places = torch.arange(n, device=harmful.device)
    parents, count = _compress(good), good.sum()
    parent = parents[(draws * count).long().clamp_max_((count - 1).clamp_min(0))]
    replaced = (harmful | dead) & (count > 0)
    nobody = torch.zeros_like(harmful)
    return Turnover(torch.where(replaced, parent, places), nobody, nobody)


def add_reinjection(turnover: Turnover, share: float, draws: Tensor) -> Turnover:
    """Replace each place, besides, with probability ``share`` by a unit drawn anew: what full support asks for."""
    chosen = draws < share
    places = torch.arange(chosen.numel(), device=chosen.device)
    # a place that is somebody's parent in this event may be overwritten all the same: transport comes first
    index = torch.where(chosen, places, turnover.index)
    return Turnover(index, turnover.born | chosen, turnover.harmful & ~chosen)


def _compress(mask: Tensor) -> Tensor:
    """The indices where ``mask`` holds, in order, padded with 0 to the length of ``mask``; no host read."""
    n = mask.numel()
    slot = torch.where(mask, mask.cumsum(0) - 1, n)
    out = torch.zeros(n + 1, dtype=torch.int64, device=mask.device)
    return out.scatter_(0, slot, torch.arange(n, device=mask.device))[:n]
