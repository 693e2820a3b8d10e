"""Whether two blocks compute the same function of their input and tensors, as far as their structure tells.

Equal tensor shapes do not suffice: strides, window shifts, groups or a block's own constants may differ. So the
configuration that the forward pass *reads* is compared too. What belongs to the position and not to the particle is
left out: drop probabilities, and modules that are nothing but a drop or an identity.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

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
        for key in sorted(reads.get(id(module), ())):
            if key in module.__dict__ and key not in _PLAIN and "drop" not in key.lower():
                described[f"{name}.{key}" if name else key] = plain(module.__dict__[key])
    return described


def difference(one: Mapping[str, Any], other: Mapping[str, Any], other_name: str = "the other") -> str | None:
    """The first difference between two descriptions in words; ``None`` if they are equal."""
    for key in (*one, *other):
        mine, theirs = one.get(key, "nothing"), other.get(key, "nothing")
        if mine != theirs:
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
