"""Whether two blocks compute the same function of their input and tensors, as far as their structure tells.

Equal tensor shapes do not suffice: strides, window shifts, groups or a block's own constants may differ. So the
configuration that the forward pass *reads* is compared too. What belongs to the position and not to the particle is
left out: drop probabilities, and modules that are nothing but a drop or an identity.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from torch_meanfield._torch import buffers_of, parameters_of

_PLAIN = set(nn.Module().__dict__)
Reads = dict[int, set[str]]


@contextmanager
def reads_recorded(model: nn.Module) -> Iterator[Reads]:
    """While the context lasts, note which attributes of each module of ``model`` are read, by the module's ``id``."""
    reads: Reads = {}
    classes = []
    try:
        for module in model.modules():
            try:
                cls = type(module)
                module.__class__ = _watched(cls, reads)
                classes.append((module, cls))
            except TypeError:  # scripted modules
                continue
        yield reads
    finally:
        for module, cls in classes:
            module.__class__ = cls


def _watched(cls: type, reads: Reads) -> type:
    def read(self: Any, name: str) -> Any:
        reads.setdefault(id(self), set()).add(name)
        return cast(Any, cls).__getattribute__(self, name)

    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__getattribute__": read}
    return type(cls.__name__, (cls,), body)


def is_drop(module: nn.Module) -> bool:
    """A module that only drops, or does nothing."""
    kind = type(module).__name__.lower()
    drops = "drop" in kind or "stochasticdepth" in kind or isinstance(module, nn.Identity)
    return drops and not any(True for _ in module.parameters())


Description = dict[str, Any]


class Attribute(NamedTuple):
    """In a description: an attribute that the forward pass read."""

    value: Any

    def __str__(self) -> str:
        return str(self.value)


def describe(block: nn.Module, reads: Reads) -> Description:
    """What must be equal in exchangeable blocks, by qualified name inside the block."""
    described: Description = {}
    hidden: list[str] = []
    first: dict[int, str] = {}
    for name, module in block.named_modules(remove_duplicate=False):
        if any(name.startswith(f"{h}.") for h in hidden):
            continue
        if is_drop(module):
            hidden.append(name)
            described[name] = "a drop or identity"
            continue
        described[name] = type(module).__qualname__
        for key, tensor in (*parameters_of(module).items(), *buffers_of(module).items()):
            path = f"{name}.{key}" if name else key
            if tensor is not None:
                tied = first.setdefault(id(tensor), path)
                described[path] = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}" + (
                    f", tied to {tied}" if tied != path else ""
                )
        for key, value in sorted(attributes_of(module).items()):
            if key in reads.get(id(module), ()) and "drop" not in key.lower():
                described[f"{name}.{key}" if name else key] = Attribute(plain(value))
    return described


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """What a module holds besides what every module does: its own configuration."""
    return {key: value for key, value in module.__dict__.items() if key not in _PLAIN}


def places_apart(one: str, other: str) -> int | None:
    """The difference of the numbers in two names that are equal but for one number; else ``None``."""
    pairs = [(a, b) for a, b in zip(one.split("."), other.split("."), strict=False) if a != b]
    if one.count(".") != other.count(".") or len(pairs) != 1 or not all(part.isdecimal() for part in pairs[0]):
        return None
    return int(pairs[0][1]) - int(pairs[0][0])


def ignored(key: str, ignore: Sequence[str]) -> bool:
    """Whether the name of the attribute ``key`` is among the patterns."""
    return any(fnmatchcase(key.rpartition(".")[2], pattern) for pattern in ignore)


def counts(one: Any, other: Any, places: int | None) -> bool:
    """Whether two entries of descriptions are attributes that count the blocks, which are ``places`` places apart."""
    both = isinstance(one, Attribute) and isinstance(other, Attribute)
    return both and type(one.value) is type(other.value) is int and other.value - one.value == places


def difference(
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    other_name: str = "the other",
    *,
    places: int | None = None,
    ignore: Sequence[str] = (),
    carried: Collection[str] = (),
) -> str | None:
    """The first difference between two descriptions in words; ``None`` if the blocks may change places.

    An attribute may differ, and stays where it is, if it counts the blocks (to be tried with numbers) or is ignored.

    Args:
        places: how many places they are apart; ``None`` if that is not known, or cannot be tried.
        ignore: patterns of attributes.
        carried: attributes that can travel with the particle.
    """
    for key in (*one, *other):
        mine, theirs = one.get(key, "nothing"), other.get(key, "nothing")
        if mine == theirs or key in carried or counts(mine, theirs, places):
            continue
        if isinstance(mine, Attribute) or isinstance(theirs, Attribute):
            if ignored(key, ignore):
                continue
        return f"at {key or 'its top'!r} it has {_short(mine)}, {other_name} has {_short(theirs)}"
    return None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def plain(value: Any, depth: int = 3) -> Any:
    """``value`` as something that compares by content."""
    if isinstance(value, nn.Parameter):  # an alias (recurrent layers keep a list): the values are the particle's own
        return ("parameter", tuple(value.shape), str(value.dtype))
    if isinstance(value, Tensor):
        content = None if value.is_meta or value.numel() > 1_000_000 else value.detach().cpu().tolist()
        return ("tensor", tuple(value.shape), str(value.dtype), content)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v, depth - 1) for k, v in value.items()} if depth else type(value).__qualname__
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [plain(v, depth - 1) for v in items] if depth else type(value).__qualname__
    if isinstance(value, functools.partial):
        return [plain(value.func, depth), plain(value.args, depth), plain(value.keywords, depth)]
    if isinstance(value, types.MethodType):
        return value.__func__.__qualname__
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, nn.Module) or not depth or not hasattr(value, "__dict__"):
        return type(value).__qualname__
    return [type(value).__qualname__, {k: plain(v, depth - 1) for k, v in vars(value).items()}]
