"""What blocks are handed beside the stream, as a rotary table: it stays at its place, so it must be one for all."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_meanfield._torch import version_of
from torch_meanfield.convert.blocks import Block
from torch_meanfield.convert.description import Attribute, plain
from torch_meanfield.convert.residual import origin
from torch_meanfield.convert.trace import ForwardGraph, ModuleCall, Value


class Handed:
    """One tensor that a block was called with.

    Two are equal if they are one tensor or the same was computed twice; or if they have the same content and depend on
    no parameter: what parameters make is equal at most for now.

    Args:
        value: what it is in the graph.
        tensor: the tensor, as it was at the call unless it has been written since.
        version: its version at the call.
    """

    def __init__(self, value: Value, tensor: Tensor, version: int) -> None:
        self.value, self.tensor, self.version = origin(value), tensor, version

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Handed):
            return NotImplemented
        if _same_computation(self.value, other.value):
            return True
        if any(each._is_unknown() or _reads_parameters(each.value) for each in (self, other)):
            return False
        a, b = self.tensor.detach(), other.tensor.detach()
        alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        return alike and torch.equal(a, b)

    __hash__ = None  # type: ignore[assignment]

    def _is_unknown(self) -> bool:
        return self.tensor.is_meta or version_of(self.tensor) != self.version

    def __repr__(self) -> str:
        maker = self.value.node.module if self.value.node is not None else self.value.name
        return f"a tensor {tuple(self.tensor.shape)}" + (f" of {maker!r}" if maker else "")


def _same_computation(one: Value, other: Value) -> bool:
    """Whether both were computed by the same functions from the same tensors and literals."""
    waiting: list[tuple[Any, Any]] = [(one, other)]
    seen: set[tuple[int, int]] = set()
    while waiting:
        a, b = waiting.pop()
        if a is b or (id(a), id(b)) in seen:
            continue
        if isinstance(a, Value) and isinstance(b, Value):
            seen.add((id(a), id(b)))
            if a.node is None or b.node is None or a.node.name != b.node.name:
                return False
            if a.node.outputs.index(a) != b.node.outputs.index(b):
                return False
            waiting += [(a.node.args, b.node.args), (list(a.node.kwargs.items()), list(b.node.kwargs.items()))]
        elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            if len(a) != len(b):
                return False
            waiting += zip(a, b, strict=True)
        elif type(a) is not type(b) or plain(a) != plain(b):
            return False
    return True


def _reads_parameters(value: Value) -> bool:
    """Whether a parameter is among what ``value`` was computed from."""
    waiting, seen = [value], set[Value]()
    while waiting:
        value = waiting.pop()
        if value.kind == "parameter":
            return True
        if value.node is not None and value not in seen:
            seen.add(value)
            waiting += value.node.inputs
    return False


def describe_handed(blocks: Sequence[Block], graph: ForwardGraph, modules: Mapping[str, nn.Module]) -> None:
    """Add to the descriptions of ``blocks`` the tensors that they were handed, ``"forward.<argument>"``.

    Left out is what comes from another block beside them: the stream, and what else runs along with it.
    """
    families: dict[str, list[Block]] = {}
    for block in blocks:
        if len(block.call.tensors) > 1:
            families.setdefault(block.name.rpartition(".")[0], []).append(block)
    for family in (f for f in families.values() if len(f) > 1):
        streaming = _descendants([v for b in family for v in b.call.outputs], graph)
        given = [_by_name(b.call, modules[b.name]) for b in family]
        along = {name for of_one in given for name, hs in of_one.items() if any(h.value in streaming for h in hs)}
        for block, of_one in zip(family, given, strict=True):
            for name in of_one.keys() - along:
                block.description[f"forward.{name}"] = Attribute(of_one[name])


def _by_name(call: ModuleCall, module: nn.Module) -> dict[str, list[Handed]]:
    """The tensors of each argument, by its name."""
    try:
        names = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind < p.VAR_POSITIONAL]
    except (TypeError, ValueError):  # a scripted or compiled forward
        names = []
    given = {}
    for key, tensors in call.tensors.items():
        place = int(key) if key.isdecimal() else len(names)
        given[names[place] if place < len(names) else key] = [Handed(*each) for each in tensors]
    return given


def _descendants(values: Sequence[Value], graph: ForwardGraph) -> set[Value]:
    """``values``, and what is computed from them."""
    found: set[Value] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if value not in found:
            found.add(value)
            waiting += [out for node in graph.readers.get(value, ()) for out in node.outputs]
    return found
