"""What an optimizer keeps for the particles it trains, and which optimizers there are."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from torch_meanfield.particles.columns import Column

# Optimizers that have taken a step. One that never stepped holds no state that could have to move; one whose state
# was loaded but that has not stepped yet is known only to its user, who passes it to the call that moves particles.
_stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_lock = threading.Lock()
_trial = threading.local()


def remember(optimizer: Optimizer, *_: Any) -> None:
    """Let the state of ``optimizer`` move with particles from now on."""
    if getattr(_trial, "on", False):
        return
    with _lock:
        _stepped.add(optimizer)


@contextmanager
def unremembered() -> Iterator[None]:
    """Steps of this thread inside are trials, of optimizers that train nothing."""
    _trial.on = True
    try:
        yield
    finally:
        _trial.on = False


register_optimizer_step_post_hook(remember)


def known_optimizers(also: Iterable[Optimizer] = ()) -> list[Optimizer]:
    """Every optimizer that has stepped in this process, and those named, each once and each state dict once.

    A wrapper that shares its ``state`` with the wrapped optimizer counts once: moving a state twice would undo it.
    """
    with _lock:
        candidates = [*also, *_stepped]
    by_state = {id(optimizer.state): optimizer for optimizer in reversed(candidates)}
    return list(by_state.values())


def check_undivided(optimizer: Optimizer) -> None:
    """Raise ``TypeError`` if other ranks hold what ``optimizer`` keeps for some of its parameters."""
    if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
        raise TypeError(
            "ZeroRedundancyOptimizer keeps the state of each parameter on one rank only, so that it cannot move with "
            "the particles; use FSDP2 (fully_shard), which divides every parameter and its state alike, or DDP with "
            "the optimizer inside"
        )


def check_state(optimizer: Optimizer, column: Column, name: str) -> None:
    """Raise ``TypeError`` if what ``optimizer`` keeps for ``column`` cannot be divided among the particles.

    Nothing is changed. A :class:`.Stack` may carry any tensor that each of its particles has alike; a :class:`.Slice`
    only tensors of the parameter's own shape, and single numbers, which the particles share.
    """
    states = [(p, optimizer.state[p]) for p in column.tensors if p in optimizer.state]
    for p, state in states:
        for key, value in state.items():
            if value is None or isinstance(value, (bool, int, float)):
                continue
            if isinstance(value, Tensor):
                movable = column.owns_whole or value.layout == torch.strided
                if (value.shape == p.shape and movable) or value.numel() == 1:
                    continue
                alike = all(isinstance(s.get(key), Tensor) and s[key].shape == value.shape for _, s in states)
                if column.owns_whole and len(states) == column.size and alike:
                    continue
            what = f"type {type(value).__name__}"
            if isinstance(value, Tensor):
                layout = "" if value.layout == torch.strided else f", {value.layout}"
                what = f"shape {tuple(value.shape)}{layout}"
            raise TypeError(
                f"{name}: {type(optimizer).__name__} keeps {key!r} ({what}) for a parameter of shape "
                f"{tuple(p.shape)}, which cannot be divided among the particles; use an optimizer whose state has the "
                f"parameter's shape (SGD, AdamW, RMSprop, ...), or switch the motion off for this layer"
            )


def check_flat(optimizer: Optimizer, tensors: Iterable[Tensor], name: str) -> None:
    """Raise ``TypeError`` if ``optimizer`` trains one of ``tensors`` and keeps one vector for all its parameters.

    LBFGS does, in the state of its first parameter, where :func:`check_state` does not look for those of others.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not {id(t) for t in tensors} & {id(p) for p in params}:
        return
    total = sum(p.numel() for p in params)
    for p, state in optimizer.state.items():
        for key, value in state.items() if isinstance(state, dict) else ():
            flat = isinstance(value, Tensor) and value.ndim == 1 and value.numel() == total
            if flat and isinstance(p, Tensor) and value.numel() != p.numel():
                raise TypeError(
                    f"{name}: {type(optimizer).__name__} keeps {key!r} as one vector for all its parameters "
                    f"({total} numbers), which cannot be divided among the particles; use an optimizer whose state has "
                    f"the parameter's shape (SGD, AdamW, RMSprop, ...), or switch the motion off for this layer"
                )


def check_trained(optimizers: Iterable[Optimizer], column: Column, sources: Sequence[int], name: str) -> None:
    """Raise ``ValueError`` if a particle would move to where the optimizer that trains it does not reach.

    So with the blocks divided among optimizers, or frozen blocks left out of the only one: what is trained now would
    be trained no more, or by another optimizer, and its state lost.

    Args:
        optimizers: those that may hold the parameters.
        column: of the population, whole tensors.
        sources: place i takes what place ``sources[i]`` holds.
        name: of the population.
    """
    owned = [(o, {id(p) for group in o.param_groups for p in group["params"]}) for o in optimizers]
    for i, j in enumerate(sources):
        source, place = column.tensors[j], column.tensors[i]
        if i == j or not source.requires_grad:
            continue
        trainers = [(o, ids) for o, ids in owned if id(source) in ids]
        if trainers and not any(id(place) in ids for _, ids in trainers):
            raise ValueError(
                f"{name}: particle {j} is trained by {type(trainers[0][0]).__name__}, but would move to place {i}, "
                f"whose parameter of shape {tuple(place.shape)} that optimizer does not hold; give one optimizer the "
                f"parameters of all particles (frozen ones take no step), or switch the motion off "
                f"for this layer (re-sorting: set_automatic_resort)"
            )
