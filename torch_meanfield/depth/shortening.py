"""A layer with fewer particles: a removed block's step goes with it, and the taus after it move down by that step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_meanfield.depth.layer import MeanFieldLayer
from torch_meanfield.particles.averages import averages_of, shorten_kept_
from torch_meanfield.particles.columns import Slice
from torch_meanfield.particles.shortening import check_shortened, cut_, shorten_


def check_keeps(layer: MeanFieldLayer, kept: Sequence[int], optimizers: Iterable[Optimizer] = ()) -> None:
    """Raise the error that :func:`keep_` would raise; nothing is changed."""
    tau = layer.tau_axis.read()
    if not tau.is_meta and not bool(tau.isfinite().all()):
        raise ValueError(f"{layer._label()}: tau is not finite ({tau.tolist()}); take an earlier checkpoint")
    if not tau.is_meta and layer._read_order() is not None:
        raise ValueError(
            f"{layer._label()}: its slots are not in the order of tau ({[round(t, 4) for t in tau.tolist()]}), so that "
            f"its blocks run in another order than their names; call torch_meanfield.resort_(model) first"
        )
    check_shortened(layer.population(), kept, optimizers)


@torch.no_grad()
def keep_(
    layer: MeanFieldLayer, kept: Sequence[int], optimizers: Iterable[Optimizer] = (), *, undo: ExitStack
) -> list[Tensor]:
    """Let only the particles in the slots ``kept`` stay, in their order, in place.

    Each keeps its own step: handing the time of a removed block to its neighbour was measured to be harmful. So the
    function is that of the layer whose removed blocks have step 0.

    Args:
        layer: its slots in the order of tau.
        kept: ascending slots; there may be none.
        optimizers: whose state moves along, beside those that have stepped.
        undo: takes what undoes this.

    Returns:
        the parameters and buffers that are the layer's no more; the modules that hold them are still where they were.

    Raises:
        ValueError, TypeError: see :func:`check_keeps`. Nothing has changed then.
    """
    check_keeps(layer, kept, optimizers)
    copies = [copy for copy, _ in averages_of(layer) if isinstance(copy, MeanFieldLayer) and len(copy) == len(layer)]
    positions = {each: positions_without(each.tau_axis.read(), kept) for each in (layer, *copies)}
    sizes = {each: len(each) for each in positions}
    population = layer.population()
    gone = shorten_(population, kept, optimizers=optimizers, undo=undo)
    shorten_kept_(population, len(kept), undo)
    for copy in copies:  # their particles have moved with the layer's
        for column in copy.population().columns:
            if isinstance(column, Slice):
                cut_(column, len(kept), (), undo)
    for each, tau in positions.items():
        _settle(each, sizes[each], tau, each is layer, undo)
    return gone


def positions_without(tau: Tensor, kept: Sequence[int]) -> Tensor:
    """The positions of the particles ``kept``, by slot, when the steps of all others are gone.

    Args:
        tau: positions by slot, shape ``(n,)``; those of an average may cross.
        kept: k slots.

    Returns:
        shape ``(k,)``.

    Example:
        >>> positions_without(torch.tensor([1.0, 1.5, 3.0, 4.0]), [0, 2, 3])
        tensor([1.0000, 2.5000, 3.5000])
    """
    times, order = tau.clamp(min=0).sort(stable=True)
    steps = torch.diff(times, prepend=times.new_zeros(1))
    stays = torch.isin(order, torch.tensor(list(kept), dtype=order.dtype, device=order.device))
    lost = torch.where(stays, torch.zeros_like(steps), steps).cumsum(0)
    moved = torch.empty_like(tau).index_copy_(0, order, times - lost)
    return moved[list(kept)]


def _settle(layer: MeanFieldLayer, before: int, tau: Tensor, sorted_now: bool, undo: ExitStack) -> None:
    """Put the particles that are left at ``tau`` by their anchors: what they have learned since stays as it is."""
    axis, size = layer.tau_axis, len(tau)
    undo.callback(axis.mark_sorted, False)
    undo.callback(axis.__dict__.update, horizon=axis.horizon, unit_steps=axis.unit_steps)
    undo.callback(layer.__dict__.update, horizon=layer.horizon)
    layer.take_out_(size, undo)
    axis.anchor.copy_(axis.anchor + (tau - axis.read()))
    share = size / before
    axis.horizon = None if axis.horizon is None else float(size) if axis.horizon == before else axis.horizon * share
    layer.horizon = float(size) if layer.horizon == before else layer.horizon * share
    grid = torch.arange(1, size + 1, device=axis.anchor.device, dtype=axis.anchor.dtype)
    axis.unit_steps = axis.unit_steps and (axis.anchor.is_meta or torch.equal(axis.anchor, grid))
    axis.mark_sorted(sorted_now)
