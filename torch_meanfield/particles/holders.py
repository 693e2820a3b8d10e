"""Which objects of the process hold tensors, found by looking at all of them, and under what name."""

from __future__ import annotations

import gc
import itertools
import sys
import threading
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

_alone = threading.Lock()  # another thread would switch the collector on again

MAPPINGS: set[type] = {dict, OrderedDict, defaultdict}
CONTAINERS = (list, *MAPPINGS)
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
        optimizers, callbacks, tensors = _subclasses(Optimizer), _averaging_callbacks(), _subclasses(Tensor)
        things = _living({*CONTAINERS, *optimizers, *callbacks})
        self.optimizers: list[Optimizer] = _of(things, things, optimizers)
        self.callbacks = _of(things, things, callbacks)
        lists, dicts = _of(things, things, {list}), _of(things, things, MAPPINGS)
        self.by_parameter: list[dict[Tensor, Any]] = _beginning(dicts, dicts, tensors)
        tables = set(map(id, self.by_parameter))
        named = [t for t in _beginning(dicts, map(dict.values, dicts), tensors) if id(t) not in tables]
        self.lists: list[Any] = [*_beginning(lists, lists, tensors), *named]


def _beginning(things: Sequence[Any], contents: Iterable[Iterable[Any]], kinds: set[type]) -> list[Any]:
    """Those of ``things`` the first of whose ``contents`` is of exactly one of these types."""
    return _of(things, map(next, map(iter, contents), itertools.repeat(None)), kinds)


def _of(things: Sequence[Any], signs: Iterable[Any], kinds: set[type]) -> list[Any]:
    """Those of ``things`` whose sign is of exactly one of these types; there may be millions."""
    return list(itertools.compress(things, map(kinds.__contains__, map(type, signs))))


# A tuple that another thread is filling must not be referred to when that thread goes on. So each of these two looks at
# everything in one call that runs no Python code, and what lists the objects, an object itself, is gone with the call:
# an iterator that is not at its end would be kept by the list that it is in.

NEW = 99  # more than the objects that one look makes


def _living(kinds: set[type]) -> list[Any]:
    """Every object of exactly these types, and some nothings."""
    found: list[Any] = []
    with _alone, _uncollected():
        for generation in range(3):
            # Listed twice, in one order: what is new the second time stands at the end of the youngest. So that both
            # come to their end, the first is followed by nothings.
            found += itertools.compress(
                itertools.chain(_listed(gc.get_objects, [generation]), itertools.repeat(None, NEW)),
                map(kinds.__contains__, map(type, _listed(gc.get_objects, [generation]))),
            )
    return found


def _referrers(things: list[Any]) -> list[Any]:
    """What refers to ``things``, tuples apart."""
    with _alone, _uncollected():
        return list(itertools.filterfalse(tuple.__instancecheck__, _listed(gc.get_referrers, things))) if things else []


def _listed(ask: Callable[..., list[Any]], of: list[Any]) -> Iterable[Any]:
    """What ``ask(*of)`` will give when the first of it is wanted."""
    return itertools.chain.from_iterable(itertools.starmap(ask, [of]))


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is collected meanwhile: it runs Python code."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def living(kinds: Iterable[type]) -> list[Any]:
    """Every object of the process that is of one of these classes, or of a class below."""
    return [x for x in _living(set().union(*map(_subclasses, kinds))) if x is not None]


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
