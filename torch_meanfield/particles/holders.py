"""Which objects of the process hold tensors, found by looking at all of them, and under what name."""

from __future__ import annotations

import gc
import types
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

CONTAINERS = (list, tuple, dict, OrderedDict, defaultdict)
_NOBODY = (types.FrameType, types.FunctionType, types.CellType, types.GeneratorType, types.ModuleType, type)


class Holder(NamedTuple):
    """An object and the name of one of its attributes."""

    owner: Any
    attribute: str

    def __str__(self) -> str:
        return f"{type(self.owner).__name__}.{self.attribute}"


class Census:
    """All objects that could hold something for each particle; one look takes 0.1 s.

    Attributes:
        optimizers: every optimizer.
        callbacks: Lightning's callbacks that average weights.
        lists: lists, tuples and dicts of tensors.
        by_parameter: dicts with a tensor for each key.
    """

    def __init__(self) -> None:
        self.optimizers: list[Optimizer] = []
        self.callbacks: list[Any] = []
        self.lists: list[Any] = []
        self.by_parameter: list[dict[Tensor, Any]] = []
        rooms: dict[type, list[Any] | None] = {}
        for thing in gc.get_objects():
            kind = type(thing)
            if kind in CONTAINERS:
                self._see_container(thing)
                continue
            if kind not in rooms:
                rooms[kind] = self._room(kind)
            room = rooms[kind]
            if room is not None:
                room.append(thing)

    def _room(self, kind: type) -> list[Any] | None:
        if issubclass(kind, Optimizer):
            return self.optimizers
        return self.callbacks if kind.__name__ == "StochasticWeightAveraging" else None

    def _see_container(self, thing: Any) -> None:
        try:
            first = next(iter(thing))
            value = next(iter(thing.values())) if isinstance(thing, dict) else first
        except (StopIteration, RuntimeError):  # empty, or another thread writes it
            return
        if issubclass(type(first), Tensor) and isinstance(thing, dict):
            self.by_parameter.append(thing)
        elif issubclass(type(value), Tensor):
            self.lists.append(thing)


def held_by_optimizers() -> set[int]:
    """The identities of the parameters of every optimizer, whether it has stepped or not."""
    groups = [getattr(o, "param_groups", ()) for o in Census().optimizers]
    return {id(p) for of_one in groups for group in of_one for p in group["params"]}


def holder_of(thing: Any, *, depth: int = 4) -> Holder | None:
    """Whose attribute ``thing`` is, or that of a container around it; ``None`` for a variable of a function."""
    found = list(_attributes(thing))
    if found or depth == 0:
        return found[0] if found else None
    for referrer in gc.get_referrers(thing):
        if type(referrer) in CONTAINERS:
            above = holder_of(referrer, depth=depth - 1)
            if above is not None:
                return above
    return None


def _attributes(thing: Any) -> Iterator[Holder]:
    for referrer in gc.get_referrers(thing):
        if isinstance(referrer, _NOBODY):
            continue
        # the attributes of an object lie in itself or in its __dict__, which only the object refers to
        for owner in gc.get_referrers(referrer) if type(referrer) is dict else [referrer]:
            held = getattr(owner, "__dict__", None) if not isinstance(owner, _NOBODY) else None
            if type(held) is dict and (held is referrer or owner is referrer):
                yield from (Holder(owner, name) for name, value in held.items() if value is thing)
