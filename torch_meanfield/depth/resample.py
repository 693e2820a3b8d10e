r"""Birth and death of residual blocks: killed blocks leave their time to a neighbour, clones share their parent's.

The interval of particle l is :math:`(\tau^{l-1}, \tau^l]`, its length the step size. Lu et al. 2020, section 6.2,
leave the non-local move for the depth open; here it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_meanfield.particles import Slice, place_, transport_
from torch_meanfield.particles.copying import whole
from torch_meanfield.particles.population import check_index


@torch.no_grad()
def potential(layer: Any) -> Tensor | None:
    r"""Of each block, :math:`V_l = \Delta\tau_l\,\partial E/\partial(\Delta\tau_l)`: how the loss grows with it.

    The analogue of a neuron's outgoing weight times its gradient: the step size is what a block enters the network
    with. Since :math:`\tau^j = \sum_{l \le j} \Delta\tau_l`, the derivative is the sum of tau's gradients from l on.

    Returns:
        shape ``(n,)``, the dtype of tau; ``None`` if tau has no gradient.
    """
    offset = layer.tau_axis.offset
    if offset is None or offset.grad is None:
        return None
    tau = layer.tau_axis.read().clamp(min=0)
    grad = whole(offset.grad).to(tau.dtype)
    return torch.diff(tau, prepend=tau.new_zeros(1)) * grad.flip(0).cumsum(0).flip(0)


@torch.no_grad()
def resample_(layer: Any, index: Tensor, optimizers: Iterable[Optimizer] = (), cause: str = "birth_death") -> Tensor:
    r"""Let the blocks not named in ``index`` die and those named m times become m blocks in a row.

    The intervals are re-divided so that the blocks still cover (0, T], T the last position: that of a dead block goes
    to the next living one (of the last blocks, to the one before), and m copies share theirs in equal parts. Two
    halves of a step differ from the whole by :math:`O(\Delta\tau^2)`, and so do two neighbouring blocks of a network
    that is smooth in tau. Copies are exact, with their parent's optimizer state and what it has learned of its
    position; they part because they stand at different depths.

    Args:
        layer: a mean-field layer whose slots are in the order of tau.
        index: int64 ``(n,)``: who survives and how often, in any order.
        optimizers: whose state moves along, beside those that have stepped.
        cause: published with the motions.

    Returns:
        the index as carried out, ascending: slot i holds a copy of what slot ``index[i]`` held.

    Raises:
        ValueError: an index of the wrong length or out of range. TypeError: optimizer state that cannot be divided
            among the blocks. Nothing has moved in either case.
    """
    population = layer.population()
    sources = check_index(index.cpu(), population.size, population.name).sort().values
    old = layer.tau_axis.read().clamp(min=0)
    device, sources_there = old.device, sources.to(old.device)
    if transport_(population, sources, optimizers=optimizers, cause=cause) is None:
        return sources
    positions = shared_intervals(old, sources_there)
    moved = (positions != old[sources_there]).nonzero().squeeze(1)
    if moved.numel():
        # the place a block is put at moves, not what it has learned since: optimizer state stays true
        anchor = next(
            i for i, c in enumerate(population.columns) if isinstance(c, Slice) and c.tensor is layer.tau_axis.anchor
        )
        shifted = layer.tau_axis.anchor + (positions - layer.tau_axis.read())
        values = Slice(shifted, 0).by_particle(shifted).index_select(1, moved)
        place_(population, moved.to(device), {anchor: values}, optimizers=optimizers, cause=cause)
    layer.tau_axis.unit_steps = False
    layer.tau_axis.keep_exact_()
    layer.tau_axis.mark_sorted()
    return sources


def shared_intervals(tau: Tensor, sources: Tensor) -> Tensor:
    """Positions after a resampling: runs of equal ``sources`` share the interval that ends where their source stood.

    Args:
        tau: ascending positions, shape ``(n,)``.
        sources: ascending int64, shape ``(n,)``.

    Returns:
        ascending positions, shape ``(n,)``; the last one is that of ``tau``.
    """
    ends = tau[sources].clone()
    ends[sources == sources[-1]] = tau[-1]  # who lived last covers what those behind it left
    counts = torch.unique_consecutive(sources, return_counts=True)[1]
    last = counts.cumsum(0) - 1
    stops = ends[last]
    starts = torch.cat([stops.new_zeros(1), stops[:-1]])
    within = torch.arange(1, len(tau) + 1, device=tau.device) - (last - counts + 1).repeat_interleave(counts)
    part = within.to(tau.dtype) / counts.repeat_interleave(counts)
    start, stop = starts.repeat_interleave(counts), stops.repeat_interleave(counts)
    return torch.where(part == 1, stop, start + (stop - start) * part)
