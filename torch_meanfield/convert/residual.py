"""The residual additions of a module: those on the way from its input to its output that leave the input as it is."""

from __future__ import annotations

from dataclasses import dataclass

from torch_meanfield.convert.trace import ModuleCall, Node, Value
from torch_meanfield.convert.vocabulary import ACTIVATIONS, JOIN, NORMS, PARTS, PLUS, SAME


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

    Walking back from the output, through rearrangements, activations and norms behind an addition, and through the
    summand that itself leads back to the input. Where both do, the one with less in between is the stream. A module
    without a way of its own that holds residual modules (a norm or pointwise convolution follows them) has theirs.
    """
    found: dict[int, Addition] = {}
    for output in call.outputs:
        way = _way(output, call)
        if way is not None:
            found |= {a.node.index: a for a in way[0]}
    return [found[i] for i in sorted(found)]


def nested_additions(call: ModuleCall) -> list[Addition]:
    """Those of the module, or else of the modules inside it."""
    return additions(call) or [a for child in call.children for a in nested_additions(child)]


def _way(value: Value, call: ModuleCall) -> tuple[list[Addition], int] | None:
    """Additions between ``value`` and the input of ``call``, and how much else is in between; ``None``: no way."""
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
        elif node.name in JOIN:
            ways = [_way(v, call) for v in node.inputs]
            if any(w is None for w in ways):
                return None
            known = [w for w in ways if w is not None]
            return [a for way, _ in known for a in way], between + sum(extra for _, extra in known)
        elif node.name in PLUS and len(node.inputs) == 2 and node.name == "add":
            ways = [_way(v, call) for v in node.inputs]
            ranked = sorted((w[1], len(w[0]) == 0, i) for i, w in enumerate(ways) if w is not None)
            if not ranked:
                return None
            stream = ranked[0][2]
            chosen = ways[stream]
            branch = node.inputs[1 - stream]
            assert chosen is not None
            if branch.shape != node.outputs[0].shape and node.inputs[stream].shape != node.outputs[0].shape:
                return None
            return [*chosen[0], Addition(node, branch)], between + chosen[1]
        else:
            return None
    return [], between


def origin(value: Value) -> Value:
    """The first tensor that holds the same numbers as ``value``, whatever the arrangement."""
    while value.node is not None and value.node.name in SAME and value.node.inputs:
        value = value.node.inputs[0]
    return value
