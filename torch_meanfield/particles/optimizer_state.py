"""What an optimizer keeps for the particles it trains, and which optimizers there are."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from torch_meanfield.particles.copying import move_slice_
from torch_meanfield.particles.population import Column, Slice, Stack

# Optimizers that have taken a step. One that never stepped holds no state that could have to move; one whose state
# was loaded but that has not stepped yet is known only to its user, who passes it to the call that moves particles.
_stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_lock = threading.Lock()


def _remember(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    with _lock:
        _stepped.add(optimizer)


register_optimizer_step_post_hook(_remember)


def known_optimizers(also: Iterable[Optimizer] = ()) -> list[Optimizer]:
    """Every optimizer that has stepped in this process, and those named, each once and each state dict once.

    A wrapper that shares its ``state`` with the wrapped optimizer counts once: moving a state twice would undo it.
    """
    with _lock:
        candidates = [*also, *_stepped]
    by_state = {id(optimizer.state): optimizer for optimizer in reversed(candidates)}
    return list(by_state.values())


def check_state(optimizer: Optimizer, column: Column, name: str) -> None:
    """Raise ``TypeError`` if what ``optimizer`` keeps for ``column`` cannot be divided among the particles.

    Nothing is changed. A :class:`Stack` may carry any tensor that each of its particles has alike; a :class:`Slice`
    only tensors of the parameter's own shape, and single numbers, which the particles share.
    """
    members = column.tensors if isinstance(column, Stack) else (column.tensor,)
    states = [(p, optimizer.state[p]) for p in members if p in optimizer.state]
    for p, state in states:
        for key, value in state.items():
            if value is None or isinstance(value, (bool, int, float)):
                continue
            if isinstance(value, Tensor):
                if value.shape == p.shape or value.numel() == 1:
                    continue
                alike = all(isinstance(s.get(key), Tensor) and s[key].shape == value.shape for _, s in states)
                if isinstance(column, Stack) and len(states) == column.size and alike:
                    continue
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise TypeError(
                f"{name}: {type(optimizer).__name__} keeps {key!r} ({what}) for a parameter of shape "
                f"{tuple(p.shape)}, which cannot be divided among the particles; use an optimizer whose state has the "
                f"parameter's shape (SGD, AdamW, RMSprop, ...), or switch the motion off for this layer"
            )


def move_state_(
    optimizer: Optimizer, column: Column, index: Tensor, sources: Sequence[int], places: Tensor | None = None
) -> None:
    """Apply ``new[i] = old[index[i]]`` to what ``optimizer`` keeps for ``column`` (checked by :func:`check_state`)."""
    if isinstance(column, Slice):
        state = optimizer.state[column.tensor] if column.tensor in optimizer.state else {}
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == column.tensor.shape:
                move_slice_(Slice(value, column.dim, column.outer, column.inner), index, places)
        return
    moved = [i for i, j in enumerate(sources) if i != j]
    old = {
        j: {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[column.tensors[j]].items()}
        for j in {sources[i] for i in moved}
        if column.tensors[j] in optimizer.state
    }
    for i in moved:
        p, new = column.tensors[i], old.get(sources[i])
        if not new:  # lazy optimizers initialise on an absent or empty state: leave none behind
            optimizer.state.pop(p, None)
            continue
        state = optimizer.state[p]
        for key in [k for k in state if k not in new]:
            del state[key]
        for key, value in new.items():
            here = state.get(key)
            if isinstance(value, Tensor) and isinstance(here, Tensor) and here.shape == value.shape:
                here.copy_(value)  # in place: captured graphs and sharded optimizers hold on to the storage
            else:
                state[key] = value.clone() if isinstance(value, Tensor) else value
