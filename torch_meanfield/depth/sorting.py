"""Re-sorting after a successful optimizer step, by the particles' times (Lu et al. 2020, Algorithm 1)."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from torch_meanfield.particles import Motion, transport_
from torch_meanfield.particles.averages import lineage_of
from torch_meanfield.particles.no_compile import eagerly
from torch_meanfield.particles.optimizer_state import check_undivided

if TYPE_CHECKING:
    from torch_meanfield.depth.layer import MeanFieldLayer

# Who exists, so that a step can find the layers whose tau its own optimizer holds. Never acted on as a whole.
_layers: weakref.WeakSet[MeanFieldLayer] = weakref.WeakSet()
_lock = threading.Lock()


def register(layer: MeanFieldLayer) -> None:
    """Let optimizer steps find ``layer`` for as long as it lives."""
    lineage_of(layer)
    with _lock:
        _layers.add(layer)


def resort_(model: nn.Module, optimizer: Optimizer | Iterable[Optimizer] = ()) -> list[Motion]:
    """Re-sort every mean-field layer of ``model`` by hand, whatever its mode and whether it does so by itself.

    Args:
        model: a module that holds mean-field layers, or is one.
        optimizer: optimizers whose state must move along, beside those that have stepped in this process: one whose
            state was loaded but that has not stepped yet.

    Returns:
        the motions made, one for each layer whose order changed.

    Raises:
        TypeError: ``model`` is not a module, or ``optimizer`` is neither an optimizer nor several.
        ValueError: ``model`` holds no mean-field layer, or one whose blocks share a tensor with another module.
    """
    layers = layers_of(model, "resort_")
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    for o in optimizers:
        if not isinstance(o, Optimizer):
            raise TypeError(f"resort_: optimizer must be a torch.optim.Optimizer or several, got {type(o).__name__}")
    motions = [sort_(layer, cause="resort", optimizers=optimizers) for layer in layers]
    return [m for m in motions if m is not None]


def set_automatic_resort(model: nn.Module, enabled: bool) -> None:
    """Switch the re-sorting after optimizer steps on or off for every mean-field layer of ``model``.

    While it is off the branches still execute in the order of tau, read from the device at each forward pass.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` holds no mean-field layer.
    """
    for layer in layers_of(model, "set_automatic_resort"):
        layer.auto_resort = bool(enabled)


def layers_of(model: nn.Module, caller: str) -> list[MeanFieldLayer]:
    """Every mean-field layer in ``model``, or an error in the name of ``caller``."""
    from torch_meanfield.depth.layer import MeanFieldLayer

    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
    layers = [m for m in model.modules() if isinstance(m, MeanFieldLayer)]
    if not layers:
        raise ValueError(
            f"{caller}: {type(model).__name__} holds no MeanFieldSequential or converted stage, so there is nothing to "
            f"sort"
        )
    for layer in layers:
        layer.check_untied(model)
    return layers


def sort_(layer: MeanFieldLayer, cause: str, optimizers: Iterable[Optimizer] = ()) -> Motion | None:
    """Project tau to [0, inf) and bring the slots of ``layer`` into its order; equal positions keep theirs."""
    tau = layer.tau_axis.read()
    if tau.is_meta:
        return None
    tau = tau.cpu()
    if not bool(tau.isfinite().all()):
        _warn_once(layer, tau)
        return None
    if bool((tau < 0).any()):
        layer.tau_axis.project_()
        tau = tau.clamp(min=0)
    motion = transport_(
        layer.population(),
        tau.argsort(stable=True),
        optimizers=optimizers,
        cause=cause,
        state=cause != "load",
    )
    layer.tau_axis.keep_exact_()
    layer._sorted_at = layer.tau_axis.version()
    return motion


def _warn_once(layer: MeanFieldLayer, tau: Tensor) -> None:
    if not layer._warned:
        layer._warned = True
        warnings.warn(
            f"{layer._label()}: tau is not finite ({tau.tolist()}), so its branches are not re-sorted; the training "
            f"has diverged or an update was not finite (said once for this layer)",
            RuntimeWarning,
            stacklevel=2,
        )


@eagerly
@torch.no_grad()
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    with _lock:
        layers = [layer for layer in _layers if layer.auto_resort and layer.training]
    if not layers:
        return
    owned = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    for layer in layers:
        _check_not_replaced(layer, owned)
    layers = [layer for layer in layers if id(layer.tau_axis.offset) in owned]
    if not layers:
        return
    check_undivided(optimizer)
    # In one order on all ranks (a set has its own in each process): reading a sharded tau is a collective.
    layers.sort(key=lambda layer: owned[id(layer.tau_axis.offset)])
    for layer in layers:
        lineage_of(layer).following = False  # trained by itself: no longer somebody's average
    if not _out_of_order(layers, getattr(optimizer, "found_inf", None)):
        for layer in layers:
            layer._sorted_at = layer.tau_axis.version()
        return
    for layer in layers:
        sort_(layer, cause="resort", optimizers=[optimizer])


def _check_not_replaced(layer: MeanFieldLayer, owned: Mapping[int, int]) -> None:
    """Raise if the step was one on a tau that the layer held before its parameters were replaced."""
    now, (known,) = layer.tau_axis.offset, layer._stepped_on
    if known is now:
        return
    if known is not None and id(known) in owned:  # the layer keeps it, so the number is no other tensor's
        raise ValueError(
            f"{layer._label()}: the optimizer steps a tau that is no longer this layer's; its parameters were "
            f"replaced (by load_state_dict(assign=True), say): make the optimizer after that, or load without assign; "
            f"or they are gathered by FSDP2 since a forward pass without a backward pass: call reshard() before step()"
        )
    if id(now) in owned:
        layer._stepped_on = (now,)


def _out_of_order(layers: list[MeanFieldLayer], found_inf: Tensor | None) -> bool:
    """Whether any layer has work to do, in one read from each device (one, that is, but for split models).

    ``found_inf`` is set by a ``GradScaler`` on fused optimizers, whose ``step()`` runs on overflow too and skips on
    the device.
    """
    by_device: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for layer in layers:
        layer.tau_axis.keep_exact_()
        tau = layer.tau_axis.read()
        by_device.setdefault((tau.device, tau.dtype), []).append(tau)
    for (device, _), taus in by_device.items():
        zero = taus[0].new_zeros(1)
        steps = torch.cat([t for tau in taus for t in (zero, tau)]).diff()
        # not (0 <= step < inf) catches crossings, positions below 0, nan and inf at once
        bad = ~((steps >= 0) & (steps < torch.inf)) & _within_layers(tuple(t.numel() for t in taus), device)
        flag = bad.any()
        if found_inf is not None:
            flag = flag & (found_inf.to(device) == 0)
        if bool(flag):
            return True
    return False


@lru_cache(maxsize=64)
def _within_layers(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """True for differences inside a layer, False for those from one layer's last position to the next one's 0."""
    inside = [flag for n in sizes for flag in (*[True] * n, False)]
    return torch.tensor(inside[:-1], device=device)


register_optimizer_step_post_hook(cast(Any, _after_step))
