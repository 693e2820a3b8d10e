"""Which call makes the plain network of the depth that is left: found by trying, on the meta device.

The network of a timm name is made once more as it was before, and the call of its class recorded. Whatever argument
counts what has become fewer is given the new number; the call counts if it makes the modules and the entries that the
pruned model has.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from torch_meanfield._torch import children_of
from torch_meanfield.convert import ConvertedStage
from torch_meanfield.convert.description import is_drop
from torch_meanfield.convert.report import RECORD
from torch_meanfield.pruning.report import Constructor

_NUMBERED = re.compile(r"[^\d]*\d+")
_alone = threading.Lock()


@dataclass(frozen=True)
class Change:
    """Modules of one kind of place, and how many children they had and have.

    Attributes:
        several: whether there can be several such modules (``layer1``, ``layer2``, ...).
        before, after: one number for each.
    """

    several: bool
    before: tuple[int, ...]
    after: tuple[int, ...]


def constructor_of(model: nn.Module) -> Constructor | None:
    """The call that makes the plain network of ``model``, pruned and converted, or ``None`` if none is known."""
    owner = next((m for m in model.modules() if RECORD in m.__dict__), None)
    timm: Any = sys.modules.get("timm")
    name = _architecture(owner)
    if owner is None or timm is None or name is None or not timm.is_model(name):
        return None
    try:
        return _found(timm, owner, name)
    except Exception:  # a name that makes another network now, an argument that timm refuses: then none is known
        return None


def _architecture(model: nn.Module | None) -> str | None:
    config: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    name = config.get("architecture") if hasattr(config, "get") else None
    return name if isinstance(name, str) else None


def _found(timm: Any, model: nn.Module, name: str) -> Constructor | None:
    create: Callable[..., Any] = timm.create_model
    cls = type(model)
    arguments = _arguments(cls, lambda: create(name))
    options = {k: v for k, v in _told_by(model).items() if k in arguments and arguments[k] not in (v, (v, v))}
    old = on_meta(lambda: create(name, **options))
    arguments = _arguments(cls, lambda: create(name, **options))
    shape = _Shape(model)
    for chosen in itertools.product(*(_candidates(change, arguments) for change in _changes(old, shape))):
        new = dict(chosen)
        for constructor in (
            _call(create, "timm.create_model", (name,), {**new, **options}),
            _call(cls, f"{cls.__module__}.{cls.__qualname__}", (), {**arguments, **new}),
        ):
            if shape.is_of(constructor.build):
                return constructor
    return None


def _told_by(model: Any) -> dict[str, Any]:
    """Arguments that a model can be asked for, by which it may differ from what its name makes."""
    told: dict[str, Any] = {}
    for key, kind in (("num_classes", int), ("in_chans", int), ("global_pool", str)):
        if isinstance(getattr(model, key, None), kind):
            told[key] = getattr(model, key)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.groups == 1 and first.in_channels <= 4:
        told.setdefault("in_chans", first.in_channels)
    sizes = (getattr(m, "img_size", None) for m in model.modules())  # of what cuts the image
    size = next((s for s in sizes if isinstance(s, (tuple, list))), None)
    if size is not None:
        told["img_size"] = tuple(size) if len({*size}) > 1 else size[0]
    return told


def _changes(old: nn.Module, shape: _Shape) -> list[Change]:
    """Where the pruned model has fewer numbered children than ``old``."""
    counts: dict[str, dict[tuple[int, ...], tuple[int, int]]] = {}
    changed = set()
    for name, module in old.named_modules():
        before, after = _numbered(module), shape.children.get(name, 0)
        place = re.sub(r"\d+", "#", name)
        counts.setdefault(place, {})[tuple(map(int, re.findall(r"\d+", name)))] = before, after
        if before != after and name in shape.children:
            changed.add(place)
    found = []
    for place in sorted(changed):
        rows = [counts[place][numbers] for numbers in sorted(counts[place])]
        found.append(Change("#" in place, tuple(row[0] for row in rows), tuple(row[1] for row in rows)))
    return found


def _candidates(change: Change, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Arguments that hold the numbers of ``change`` as they were, with them as they are."""
    for name, value in arguments.items():
        if isinstance(value, int) and not isinstance(value, bool) and not change.several and (value,) == change.before:
            yield name, change.after[0]
        elif isinstance(value, (tuple, list)) and len(value) == len(change.before):
            if tuple(value) == change.before:
                yield name, type(value)(change.after)
            elif all(isinstance(v, (tuple, list)) for v in value) and tuple(map(len, value)) == change.before:
                yield name, type(value)(v[:n] for v, n in zip(value, change.after, strict=True))


class _Shape:
    """What a plain model is made of: classes of its modules, numbers of their children, shapes of its entries."""

    def __init__(self, model: nn.Module) -> None:
        stages = [n for n, m in model.named_modules() if isinstance(m, ConvertedStage)]
        plain = {n: m for n, m in model.named_modules() if not any(n == s or n.startswith(f"{s}.") for s in stages)}
        self.kinds = {n: type(m).__name__ for n, m in plain.items() if not is_drop(m)}
        self.children = {n: _numbered(m) for n, m in plain.items()}
        self.entries = {
            key: tuple(t.shape)
            for key, t in model.state_dict().items()
            if not any(key.startswith(f"{s}.") for s in stages)
        }

    def is_of(self, build: Callable[[], Any]) -> bool:
        """Whether ``build`` makes such a model."""
        try:
            other = _Shape(on_meta(build))
        except Exception:  # an argument that it does not take
            return False
        return self.entries == other.entries and self.kinds == other.kinds


def _numbered(module: nn.Module) -> int:
    children = children_of(module).items()
    return sum(bool(_NUMBERED.fullmatch(name)) for name, m in children if not isinstance(m, ConvertedStage))


def on_meta(build: Callable[[], Any]) -> Any:
    """What ``build`` makes, without memory where it can be made so."""
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError):  # computes something with tensors as it is made
        return build()


def _arguments(cls: type, build: Callable[[], Any]) -> dict[str, Any]:
    """What ``build`` calls ``cls`` with as it makes one on the meta device, defaults included."""
    with _recorded(cls) as calls:
        on_meta(build)
    return calls[0] if calls else {}


@contextmanager
def _recorded(cls: Any) -> Iterator[list[dict[str, Any]]]:
    """The arguments of each call of ``cls`` in this thread while the context lasts."""
    calls: list[dict[str, Any]] = []
    init, here = cls.__init__, threading.get_ident()

    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        if threading.get_ident() == here and type(self) is cls:
            calls.append(_bound(init, self, args, kwargs))
        init(self, *args, **kwargs)

    with _alone:
        cls.__init__ = recording
        try:
            yield calls
        finally:
            cls.__init__ = init


def _bound(init: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(init)
    bound = signature.bind(module, *args, **kwargs)
    bound.apply_defaults()
    given = dict(list(bound.arguments.items())[1:])
    for key, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(key))
    return _own(given)


def _own(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """With lists and dicts of their own: some constructors write into theirs."""
    return {k: copy.deepcopy(v) if isinstance(v, (list, dict)) else v for k, v in arguments.items()}


def _call(function: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Constructor:
    """The call as it is written, without arguments that are defaults anyway, and what carries it out."""
    defaults = {k: p.default for k, p in inspect.signature(function).parameters.items()}
    parts = [repr(a) for a in args]
    for key, value in kwargs.items():
        if key in defaults and (
            value is defaults[key] or type(value) is type(defaults[key]) and value == defaults[key]
        ):
            continue
        text = value.__name__ if isinstance(value, type) else repr(value)
        parts.append(f"{key}={text if len(text) < 60 else '...'}")
    return Constructor(f"{name}({', '.join(parts)})", partial(_made, function, tuple(args), dict(kwargs)))


def _made(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return function(*args, **_own(kwargs))
