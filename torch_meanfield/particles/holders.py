"""Which objects of the process hold tensors, found by looking at all of them, and under what name."""

from __future__ import annotations

import gc
import itertools
import operator
import sys
import threading
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

_alone = threading.Lock()

CONTAINERS = (list, dict, OrderedDict, defaultdict)
_NOBODY = (types.FrameType, types.FunctionType, types.CellType, types.GeneratorType, types.ModuleType, type)


class Holder(NamedTuple):
    """An object and the name of one of its attributes."""

    owner: Any
    attribute: str

    def __str__(self) -> str:
        return f"{type(self.owner).__name__}.{self.attribute}"


class Census:
    """All objects that could hold something for each particle.

    Attributes:
        optimizers: every optimizer.
        callbacks: Lightning's callbacks that average weights.
        lists: lists and dicts of tensors.
        by_parameter: dicts with a tensor for each key.
    """

    def __init__(self) -> None:
        self.optimizers: list[Optimizer] = []
        self.callbacks: list[Any] = []
        self.lists: list[Any] = []
        self.by_parameter: list[dict[Tensor, Any]] = []
        optimizers, callbacks = _subclasses(Optimizer), _averaging_callbacks()
        for thing in _living({*CONTAINERS, *optimizers, *callbacks}):
            if type(thing) in CONTAINERS:
                self._see_container(thing)
            else:
                (self.optimizers if type(thing) in optimizers else self.callbacks).append(thing)

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


def _living(kinds: set[type]) -> list[Any]:
    """Every object of exactly these types."""
    things = _but_tuples(gc.get_objects, [])
    return list(itertools.compress(things, map(kinds.__contains__, map(type, things))))


def _referrers(things: list[Any]) -> list[Any]:
    """What refers to ``things``, tuples apart."""
    return _but_tuples(gc.get_referrers, things) if things else []


def _but_tuples(ask: Callable[..., list[Any]], of: list[Any]) -> list[Any]:
    """What ``ask`` finds, tuples apart.

    In one call that runs no Python code (``isinstance`` may) and leaves nothing behind (a variable would): a tuple that
    another thread is filling must not be referred to when that thread goes on.
    """
    with _alone:  # another thread would switch the collector on again, and what it calls is Python code
        collecting = gc.isenabled()
        gc.disable()
        try:
            return list(itertools.compress(*_marked(itertools.chain.from_iterable(itertools.starmap(ask, [of])))))
        finally:
            if collecting:
                gc.enable()


def _marked(things: Iterable[Any]) -> tuple[Iterable[Any], Iterable[bool]]:
    """``things``, and for each whether it is no tuple; nothing is looked at yet."""
    once, again = itertools.tee(things)
    return once, map(operator.is_not, map(type, again), itertools.repeat(tuple))


def _subclasses(kind: type) -> set[type]:
    below: list[type] = kind.__subclasses__()
    return {kind}.union(*(_subclasses(k) for k in below))


def _averaging_callbacks() -> set[type]:
    """Lightning's ``StochasticWeightAveraging``, where it has been imported."""
    modules = [sys.modules.get(f"{name}.callbacks") for name in ("lightning.pytorch", "pytorch_lightning")]
    kinds = [getattr(module, "StochasticWeightAveraging", None) for module in modules]
    return set().union(*(_subclasses(kind) for kind in kinds if kind is not None))


def held_by_optimizers() -> set[int]:
    """The identities of the parameters of every optimizer, whether it has stepped or not."""
    groups = [getattr(o, "param_groups", ()) for o in Census().optimizers]
    return {id(p) for of_one in groups for group in of_one for p in group["params"]}


def holders_of(things: list[Any], *, depth: int = 1, apart_from: Iterable[Any] = ()) -> list[Holder]:
    """Whose attributes ``things`` are, or containers around them; not variables of a function, and not what is ours.

    Args:
        things: any objects, all looked for at once: each look goes through all objects of the process.
        depth: how many containers may lie around it.
        apart_from: containers that do not count.
    """
    inner, found = things, list[Holder]()
    seen = {id(inner), *map(id, apart_from)}
    for _ in range(depth + 1 if things else 0):
        outer = [r for r in _referrers(inner) if id(r) not in seen and not isinstance(r, _NOBODY)]
        attributes = [r for r in outer if type(r) is dict]
        # the attributes of an object lie in itself or in its __dict__, which it alone refers to
        owners = [r for r in outer if type(r) not in CONTAINERS]
        owners += [r for r in _referrers(attributes) if type(r) not in CONTAINERS]
        wanted = {id(t) for t in inner}
        for owner in owners:
            ours = type(owner).__module__.startswith("torch_meanfield.") or isinstance(owner, _NOBODY)
            held = None if ours else getattr(owner, "__dict__", None)
            for name, value in list(held.items()) if type(held) is dict else ():
                if id(value) in wanted:
                    found.append(Holder(owner, name))
        seen |= {id(r) for r in (inner, outer, attributes, owners, *outer)}
        inner = [r for r in outer if type(r) in CONTAINERS][:50]
        seen.add(id(inner))
        if not inner:
            break
    return found
