"""What blocks are handed beside the stream, as a rotary table: it stays at its place, so it must be one for all."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from torch_meanfield._torch import version_of
from torch_meanfield.convert.blocks import Block
from torch_meanfield.convert.description import Attribute
from torch_meanfield.convert.residual import origin
from torch_meanfield.convert.trace import ForwardGraph, ModuleCall, Value
from torch_meanfield.observe.functions import PARTS, SAME


class Handed:
    """One tensor that a block was called with.

    Two are equal if they are one tensor, or have the same content from the same maker: what two modules make, or two
    parameters hold, is equal at most for now.

    Args:
        value: what it is in the graph.
        tensor: the tensor, as it was at the call unless it has been written since.
        version: its version at the call.
    """

    def __init__(self, value: Value, tensor: Tensor, version: int) -> None:
        self.value, self.tensor, self.version = origin(value), tensor, version
        made = self.value.node
        self.maker = made.module if made is not None else self.value.name if self.value.kind == "parameter" else ""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Handed):
            return NotImplemented
        if self.value is other.value:
            return True
        if self.maker != other.maker or _is_of_a_parameter(self.value) or self._written() or other._written():
            return False
        a, b = self.tensor.detach(), other.tensor.detach()
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            return False
        return a.is_meta or torch.equal(a, b)

    __hash__ = None  # type: ignore[assignment]

    def _written(self) -> bool:
        return version_of(self.tensor) != self.version

    def __repr__(self) -> str:
        return f"a tensor {tuple(self.tensor.shape)}" + (f" of {self.maker}" if self.maker else "")


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


def _is_of_a_parameter(value: Value) -> bool:
    """Whether ``value`` is a parameter or a part of one, which will be trained apart from the others."""
    while value.node is not None and value.node.name in (SAME | PARTS) and value.node.inputs:
        value = value.node.inputs[0]
    return value.kind == "parameter"
