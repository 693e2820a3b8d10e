"""The re-sorting behind every optimizer step: the hook, and the layers it finds.

The package hooks into torch globally in three places. Times are of one core of a server, called in a loop; between a
backward pass and the next forward pass, with cold caches, they are four to ten times as long:

- An optimizer step, here: re-sorts the layers whose tau was stepped. 0.7 us a step in a process without layers, 3 us
  beside a layer of another optimizer, 11 us (and one read from the device) for a layer of its own; in a converted model
  1 us more for each layer that a step scales.
- An optimizer step, :mod:`.optimizer_state`: remembers who has stepped, whose state then moves along. 0.4 us a step.
- The registration of a submodule, :mod:`.averages`: recognises averaged copies as they are made. 0.4 us each.

The first step of an optimizer on a layer also looks once at all objects of the process, see :mod:`.unmoved`: 0.1 s.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from torch_meanfield.depth.sorting import Sortable, sort_
from torch_meanfield.depth.tau_axis import TauAxis, ascending
from torch_meanfield.particles.averages import trained_by_itself
from torch_meanfield.particles.holders import held_by_optimizers
from torch_meanfield.particles.no_compile import eagerly
from torch_meanfield.particles.optimizer_state import check_undivided
from torch_meanfield.particles.transport import check_transportable
from torch_meanfield.particles.unmoved import ask, belongings


@dataclass
class Known:
    """A layer that exists, so that a step can find it if its own optimizer holds its tau; never acted on otherwise.

    Attributes:
        layer: the layer, weakly.
        tau: the parameter that optimizers are known to step.
        place: number of the group and place in it where an optimizer held ``tau`` last, so that it need not search.
    """

    layer: weakref.ref[Sortable]
    tau: Tensor | None
    place: tuple[int, int] = (0, 0)


class Owned:
    """Where ``optimizer`` holds what, listed only if a parameter is not where it was found last."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.groups = optimizer.param_groups
        self.places: dict[int, tuple[int, int]] | None = None

    def holds(self, tau: Tensor | None, known: Known) -> bool:
        """Whether the optimizer steps ``tau``; remembers where."""
        g, i = known.place
        if g < len(self.groups) and i < len(self.groups[g]["params"]) and self.groups[g]["params"][i] is tau:
            return True
        if self.places is None:
            self.places = {id(p): (g, i) for g, group in enumerate(self.groups) for i, p in enumerate(group["params"])}
        known.place = self.places.get(id(tau), known.place)
        return id(tau) in self.places


_layers: dict[int, Known] = {}
_asked: dict[int, tuple[int, weakref.ref[Optimizer]]] = {}  # how many layers an optimizer stepped when it was asked


def register(layer: Sortable) -> None:
    """Let optimizer steps find ``layer`` for as long as it lives."""
    number = id(layer)
    _layers[number] = Known(weakref.ref(layer, lambda _: _layers.pop(number, None)), layer.tau_axis.offset)


@eagerly
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    owned = Owned(optimizer)
    stepped: list[tuple[tuple[int, int], Sortable, TauAxis]] = []
    for known in list(_layers.values()):
        layer = known.layer()
        if layer is None or not layer.auto_resort:
            continue
        axis = layer.tau_axis
        tau = axis.offset
        if tau is not known.tau:
            _check_not_replaced(known, layer, owned)
        if owned.holds(tau, known):
            stepped.append((known.place, layer, axis))
    number = id(optimizer)
    if _layers and (number not in _asked or len(stepped) > _asked[number][0]):
        _asked[number] = len(stepped), weakref.ref(optimizer, lambda _: _asked.pop(number, None))
        _at_first_step(optimizer, [layer for _, layer, _ in stepped])
    if not stepped:
        return
    check_undivided(optimizer)
    # In one order on all ranks (that in which they were made may differ): reading a sharded tau is a collective.
    stepped.sort(key=lambda entry: entry[0])
    taus = []
    for _, layer, axis in stepped:
        layer.check_held_()
        trained_by_itself(layer)
        axis.keep_exact_()
        taus.append(axis.read())
    if _in_order(taus) or bool(getattr(optimizer, "found_inf", None)):
        for _, _, axis in stepped:
            axis.mark_sorted()
    else:
        for _, layer, _ in stepped:
            sort_(layer, cause="resort", optimizers=[optimizer])


def _at_first_step(optimizer: Optimizer, layers: list[Sortable]) -> None:
    """Ask who holds what of the particles, and refuse now what could not move when blocks cross for the first time."""
    populations = [layer.population() for layer in layers]
    if populations:
        ask(optimizer, [belongings(p) for p in populations])
    for population in populations:
        check_transportable(population, range(population.size), [optimizer])
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer in [known.layer() for known in list(_layers.values())]:
        tau = None if layer is None else layer.tau_axis.offset
        if layer is None or tau is None or not tau.requires_grad or id(tau) in mine:
            continue
        try:
            owned = [p for p in belongings(layer.population()).parameters if p.requires_grad]
        except RuntimeError:
            continue  # a stage whose blocks are gone
        if owned and all(id(p) in mine for p in owned) and id(tau) not in held_by_optimizers():
            warnings.warn(
                f"{layer._label()}: its blocks are trained, but its tau is in no optimizer, and perhaps no "
                f"parameter of the model that is trained (a tool may have taken blocks out of it): pass "
                f"tau_axis.offset too and save it, or fix it by tau_axis.offset.requires_grad_(False)",
                RuntimeWarning,
                stacklevel=2,
            )


def _check_not_replaced(known: Known, layer: Sortable, owned: Owned) -> None:
    """Raise if the step was one on a tau that the layer held before its parameters were replaced."""
    if known.tau is not None and owned.holds(known.tau, known):  # kept alive here: its id is no other tensor's
        raise ValueError(
            f"{layer._label()}: the optimizer steps a tau that is no longer this layer's; its parameters were "
            f"replaced (by load_state_dict(assign=True), say): make the optimizer after that, or load without assign; "
            f"or they are gathered by FSDP2 since a forward pass without a backward pass: call reshard() before step()"
        )
    if owned.holds(layer.tau_axis.offset, known):
        known.tau = layer.tau_axis.offset


def _in_order(taus: list[Tensor]) -> bool:
    """Whether no layer has work to do, in one read from each device (one, that is, but for split models)."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tau in taus:
        by_device.setdefault(tau.device, []).append(tau)
    for together in by_device.values():
        times = (together[0] if len(together) == 1 else torch.cat(together)).tolist()
        for tau in together:
            if not ascending(times[: len(tau)]):
                return False
            times = times[len(tau) :]
    return True


register_optimizer_step_post_hook(cast(Any, _after_step))
