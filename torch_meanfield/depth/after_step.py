"""The re-sorting behind every optimizer step: the hook, and the layers it finds.

The package hooks into torch globally in three places; times are of one core of a server:

- An optimizer step, here: re-sorts the layers whose tau was stepped. 2 us a step in a process without layers, 8 us
  beside a layer of another optimizer, 20 us (and one read from the device) for a layer of its own.
- An optimizer step, :mod:`.optimizer_state`: remembers who has stepped, whose state then moves along. 0.4 us a step.
- The registration of a submodule, :mod:`.averages`: recognises averaged copies as they are made. 0.4 us each.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from itertools import chain, count
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from torch_meanfield.depth.sorting import Sortable, sort_
from torch_meanfield.particles.averages import trained_by_itself
from torch_meanfield.particles.no_compile import eagerly
from torch_meanfield.particles.optimizer_state import check_undivided

# Which layers exist, so that a step can find those whose tau its own optimizer holds, and the tau that optimizers are
# known to step. Never acted on as a whole.
_layers: weakref.WeakKeyDictionary[Sortable, Tensor | None] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def register(layer: Sortable) -> None:
    """Let optimizer steps find ``layer`` for as long as it lives."""
    with _lock:
        _layers[layer] = layer.tau_axis.offset


@eagerly
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    with _lock:
        layers = [(layer, layer.tau_axis) for layer in _layers if layer.auto_resort and layer.training]
    if not layers:
        return
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    owned = dict(zip(map(id, params), count()))
    stepped = []
    for layer, axis in layers:
        offset = axis.offset
        if offset is not _layers[layer]:
            _check_not_replaced(layer, offset, owned)
        if id(offset) in owned:
            stepped.append((owned[id(offset)], layer, axis))
    if not stepped:
        return
    check_undivided(optimizer)
    # In one order on all ranks (a set has its own in each process): reading a sharded tau is a collective.
    stepped.sort(key=lambda entry: entry[0])
    taus = []
    for _, layer, axis in stepped:
        trained_by_itself(layer)
        axis.keep_exact_()
        taus.append(axis.read())
    out_of_order = _out_of_order(taus, getattr(optimizer, "found_inf", None))
    for _, layer, axis in stepped:
        if out_of_order:
            sort_(layer, cause="resort", optimizers=[optimizer])
        else:
            axis.mark_sorted()


def _check_not_replaced(layer: Sortable, now: Tensor | None, owned: Mapping[int, int]) -> None:
    """Raise if the step was one on a tau that the layer held before its parameters were replaced."""
    known = _layers[layer]
    if known is not None and id(known) in owned:  # it is kept alive here, so the number is no other tensor's
        raise ValueError(
            f"{layer._label()}: the optimizer steps a tau that is no longer this layer's; its parameters were "
            f"replaced (by load_state_dict(assign=True), say): make the optimizer after that, or load without assign; "
            f"or they are gathered by FSDP2 since a forward pass without a backward pass: call reshard() before step()"
        )
    if id(now) in owned:
        _layers[layer] = now


def _out_of_order(taus: list[Tensor], found_inf: Tensor | None) -> bool:
    """Whether any layer has work to do, in one read from each device (one, that is, but for split models).

    ``found_inf`` is set by a ``GradScaler`` on fused optimizers, whose ``step()`` runs on overflow too and skips on
    the device.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for tau in taus:
        by_device.setdefault(tau.device, []).append(tau)
    for together in by_device.values():
        values = iter((together[0] if len(together) == 1 else torch.cat(together)).tolist())
        for tau in together:
            before = 0.0
            for _ in range(tau.numel()):
                time = next(values)
                if not before <= time < float("inf"):  # crossings, positions below 0, nan and inf at once
                    return found_inf is None or not bool(found_inf)
                before = time
    return False


register_optimizer_step_post_hook(cast(Any, _after_step))
