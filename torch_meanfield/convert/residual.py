"""The residual additions of a module: those on the way from its input to its output that leave the input as it is."""

from __future__ import annotations

from dataclasses import dataclass

from torch_meanfield.convert.trace import ModuleCall, Node, Value
from torch_meanfield.observe.functions import ACTIVATIONS, JOIN, NORMS, PARTS, SAME


@dataclass(frozen=True, eq=False)
class Addition:
    """One addition of a branch to the stream.

    Attributes:
        node: the addition.
        branch: the summand that is computed by the branch.
    """

    node: Node
    branch: Value


def additions(call: ModuleCall) -> list[Addition]:
    """The residual additions of a module call in the order of execution; none if it is no residual block.

    Walking back from the output, through rearrangements, activations, norms and learned scales of the stream, and
    through the summand that itself leads back to the input. Where both do, the one with less in between is the stream.
    """
    found: dict[int, Addition] = {}
    for output in call.outputs:
        way = _way(output, call)
        if way is not None:
            found |= {a.node.index: a for a in way[0]}
    return [found[i] for i in sorted(found)]


def nested_additions(call: ModuleCall, nodes: list[Node]) -> list[Addition]:
    """The residual additions of a module, or if it has none, every ``h + f(h)`` inside it, wherever it stands.

    For blocks whose stream runs through a layer of its own (a convolution between attention and MLP in TinyViT, behind
    the residual module in ConvMixer).

    Args:
        call: the call of the module.
        nodes: all nodes of the graph.
    """
    return additions(call) or [
        found for node in nodes[call.start : call.end] if (found := local_addition(node, call)) is not None
    ]


def local_addition(node: Node, call: ModuleCall) -> Addition | None:
    """``node`` as the addition ``h + f(h)`` of a branch that was computed inside ``call`` from the other summand."""
    if node.name != "add" or len(node.inputs) != 2 or node.inputs[0].shape != node.inputs[1].shape:
        return None
    for stream, branch in (node.inputs, node.inputs[::-1]):
        if stream.constant or branch.constant:
            continue
        first = origin(stream, call.start)
        if first is not origin(branch, call.start) and first in _ancestors(branch, call):
            return Addition(node, branch)
    return None


def _ancestors(value: Value, call: ModuleCall) -> set[Value]:
    """All values that ``value`` is computed from inside the call, and the values from outside that they begin with."""
    found: set[Value] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if value in found or value.constant:
            continue
        found.add(value)
        if value.node is not None and value.node.index >= call.start:
            waiting += value.node.inputs
    return found


def _way(value: Value, call: ModuleCall) -> tuple[list[Addition], int] | None:
    """Additions between ``value`` and the input of ``call``, and the number of other operations; ``None``: no way."""
    between = 0
    while value not in call.inputs:
        node = value.node
        if node is None or not call.start <= node.index < call.end or not node.inputs:
            return None
        if node.name in SAME or node.name in PARTS:
            value = node.inputs[0]
        elif node.name in ACTIVATIONS or node.name in NORMS:
            between += 1
            value = node.inputs[0]
        elif node.name in ("mul", "multiply") and sum(not v.constant for v in node.inputs) == 1:
            between += 1  # a learned scale on the stream
            value = next(v for v in node.inputs if not v.constant)
        elif node.name in JOIN:
            ways = [_way(v, call) for v in node.inputs]
            if any(w is None for w in ways):
                return None
            known = [w for w in ways if w is not None]
            return [a for way, _ in known for a in way], between + sum(extra for _, extra in known)
        elif node.name == "add" and len(node.inputs) == 2:
            ways = [_way(v, call) for v in node.inputs]
            ranked = sorted((w[1], len(w[0]) == 0, i) for i, w in enumerate(ways) if w is not None)
            if not ranked:
                return None
            stream = ranked[0][2]
            chosen = ways[stream]
            branch = node.inputs[1 - stream]
            assert chosen is not None
            if branch.constant:  # an embedding or a learned shift: the stream goes on
                return chosen[0], between + chosen[1] + 1
            if branch.shape != node.outputs[0].shape and node.inputs[stream].shape != node.outputs[0].shape:
                return None
            return [*chosen[0], Addition(node, branch)], between + chosen[1]
        else:
            return None
    return [], between


def origin(value: Value, start: int = 0) -> Value:
    """The first value, from node ``start`` on, with the same numbers as ``value``, in whatever arrangement."""
    while value.node is not None and value.node.index >= start and value.node.name in SAME and value.node.inputs:
        value = value.node.inputs[0]
    return value
