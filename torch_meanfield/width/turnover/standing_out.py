"""The default scheme: it replaces units that stand out of their own noise, and needs no tuning from layer to layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_meanfield.width.turnover.decide import Evidence, Turnover, TurnoverRule, Uniform, from_parents, reborn

MARGIN = 10.0  # by which a removal's true cost may exceed what the noise says, see removal()


@dataclass(frozen=True)
class StandingOut(TurnoverRule):
    """``scheme="standing_out"``: replace dormant units, and those without which the loss is expected to fall.

    See :func:`standing_out`.

    Args:
        rate: the largest share of the units that may be replaced as harmful in one event, rounded down: a population
            of a few units (attention heads) loses none that works. At 0 no unit is replaced.
        threshold: how far a potential must stand out, in standard errors of its own average.

    Raises:
        ValueError: a rate above 1.
    """

    rate: float
    threshold: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs_batch_size", self.rate > 0)
        if self.rate > 1:
            raise ValueError(
                f"rate must be at most 1 under scheme='standing_out', where it is a share of the population; got "
                f"{self.rate!r}"
            )

    def decide(self, seen: Evidence, inherits: bool, uniform: Uniform) -> Turnover:
        """See :meth:`.TurnoverRule.decide`."""
        # An exponential average with weights 1/window of noise of deviation s has the deviation s / sqrt(2 window - 1).
        kappa = self.threshold / math.sqrt(2 * seen.window - 1)
        coherence, mature, size = seen.coherence, seen.mature, seen.batch_size
        change = torch.ones_like(seen.mean) if size is None else removal(seen.mean, seen.square, size)
        harmful, dormant = standing_out(seen.mean, coherence, mature, seen.quiet, change, self.rate, kappa, seen.window)
        if not self.rate:
            dormant = torch.zeros_like(dormant)
        if not inherits:
            return reborn(harmful, dormant)
        return from_parents(harmful, dormant, mature & (coherence < -kappa), uniform(len(seen.mean)))


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
    r"""Which units are to be replaced.

    A unit is *harmful* if its averaged potential is positive (the loss falls as its outgoing weights shrink), if it
    stands out of its own noise, :math:`m_i > \kappa s_i` with m the average of the potential and s its root mean
    square (for pure noise the ratio is of the order :math:`\text{window}^{-1/2}` whatever the layer, the loss or the
    learning rate), and if the loss is expected to fall not only as it shrinks a little but when it is gone, see
    :func:`removal`. It is *dormant* if its potential was exactly 0 at every step of a window.

    Args:
        mean, coherence, mature, quiet: see :class:`.Evidence`; shape ``(n,)``.
        removal: expected change of the loss when the unit is taken away, shape ``(n,)``.
        share: the largest share of the n units that may be replaced as harmful in one event, rounded down.
        threshold: kappa.
        window: length of the average in steps.

    Returns:
        (harmful, dormant), bool of shape ``(n,)`` each, disjoint.
    """
    n = mean.numel()
    dormant = mature & (quiet >= window)
    harmful = mature & ~dormant & (coherence > threshold) & (mean > 0) & (removal < 0)
    most = int(share * n)
    if most == 0:
        return torch.zeros_like(harmful), dormant
    if most < n:
        # the most harmful first, ties (clones) in the order of places: no sort, and alike on every device
        ranked = torch.where(harmful, mean, -torch.inf)
        least = ranked.kthvalue(n - most + 1).values
        above, ties = ranked > least, ranked == least
        harmful = harmful & (above | (ties & (ties.cumsum(0) <= most - above.sum())))
    return harmful, dormant


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
        mean, square: averages of V and of its square over steps, shape ``(n,)``, see :class:`.Evidence`.
        batch_size: B, samples in a step.
    """
    noise = (square - mean.square()).clamp_min(0)
    return MARGIN * (batch_size * noise + mean.square()) / 2 - mean
