"""Which parameters to multiply by s so that a branch is multiplied by s: its last affine maps, and gates behind them.

The answer is read off the graph of one forward pass; :mod:`.trial` then proves it with numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch_meanfield.convert.trace import ForwardGraph, Node, Value
from torch_meanfield.observe.functions import (
    ATTENTION,
    JOIN,
    LAYERS,
    LIKE,
    LINEAR,
    MULTIHEAD,
    NORMS,
    OVER,
    PLUS,
    POSITIVE,
    TIMES,
)

Powers = dict[Value, int]  # parameters and the power of the step that each is multiplied by: 1 or -1


class NotScalable(Exception):
    """A branch cannot be multiplied by scaling parameters; the message says why."""


def last_affines(branch: Value, avoid: frozenset[Value] = frozenset()) -> set[Value]:
    """The parameters of the last affine maps before ``branch``: scaling them scales it, gates aside.

    Args:
        branch: the tensor to scale.
        avoid: parameters that must keep their value.

    Raises:
        NotScalable: something stands behind the affine map that does not commute with a positive factor.
    """
    node = branch.node
    if branch.kind == "parameter":
        if branch in avoid:
            raise NotScalable(f"its last affine parameter {branch.name!r} is read elsewhere too")
        return {branch}
    if node is None:
        raise NotScalable(
            "the branch was computed outside of torch's functions, or leads to the input without an affine layer"
        )
    name = node.name
    if name in LINEAR or name in POSITIVE:
        return last_affines(_first(node), avoid)
    if name in JOIN or name in PLUS:
        terms = [v for v in node.inputs if v.kind != "buffer"]
        if len(terms) < (1 if name in JOIN or _adds_zero(node) else 2):
            raise NotScalable(f"a constant is added behind the last affine layer ({_where(node)})")
        return set().union(*(last_affines(v, avoid) for v in terms))
    if name in LAYERS or name in NORMS:
        return _layer(node, avoid)
    if name == MULTIHEAD:
        weight, bias = node.arg(11, "out_proj_weight"), node.arg(12, "out_proj_bias")
        return _scaled_operands(node, [weight, bias], avoid)
    if name in ATTENTION:
        return last_affines(node.arg(2, "value"), avoid)
    if name in OVER:
        return last_affines(_first(node), avoid)
    if name in TIMES:
        return _factor(node, avoid)
    raise NotScalable(f"{name} stands behind the last affine layer ({_where(node)})")


def _adds_zero(node: Node) -> bool:
    """Whether the literal that is added is 0: ``sum()`` of a list begins with it."""
    return any(isinstance(a, (int, float)) and a == 0 for a in node.args[:2])


def _first(node: Node) -> Value:
    if not node.inputs:
        raise NotScalable(f"{node.name} makes the branch from no tensor ({_where(node)})")
    return node.inputs[0]


def _layer(node: Node, avoid: frozenset[Value]) -> set[Value]:
    (_, *rest) = LAYERS.get(node.name) or NORMS[node.name]
    operands = [node.arg(*at) for at in rest]
    weight = operands[0]
    if not isinstance(weight, Value):
        raise NotScalable(f"{node.name} without weights undoes every factor before it ({_where(node)})")
    return _scaled_operands(node, operands, avoid)


def _scaled_operands(node: Node, operands: Sequence[object], avoid: frozenset[Value]) -> set[Value]:
    values = [v for v in operands if isinstance(v, Value)]
    if not values:
        raise NotScalable(f"{node.name} has no weight of its own ({_where(node)})")
    return set().union(*(last_affines(v, avoid) for v in values))


def _factor(node: Node, avoid: frozenset[Value]) -> set[Value]:
    """One factor of a product takes the step: a learned one if there is one, else the first that can."""
    operands = [v for v in node.inputs if v.kind != "buffer"]
    learned = [v for v in operands if v.constant]
    reason = f"{node.name} of constants ({_where(node)})"
    for value in (*learned, *(v for v in operands if v not in learned)):
        if value.constant and not _learned(value):
            continue
        try:
            return last_affines(value, avoid)
        except NotScalable as error:
            reason = str(error)
    raise NotScalable(reason)


def _learned(value: Value) -> bool:
    if value.node is None:
        return value.kind == "parameter"
    return any(_learned(v) for v in value.node.inputs)


def _where(node: Node) -> str:
    return f"in {node.module}" if node.module else "in forward"


def powers(
    graph: ForwardGraph, span: range, branches: Iterable[Value], stream: Iterable[Value]
) -> tuple[Powers, Powers]:
    """The parameters to scale so that every branch of one block is multiplied by s and nothing else changes.

    To the last affines come, with power -1, the weights that read an already scaled tensor inside a gate
    (``u * gate(u)``: squeeze-and-excitation) or beside it (ghost modules).

    Args:
        graph: the graph of the forward pass.
        span: the indices of the block's nodes.
        branches: what the residual additions of the block add.
        stream: the results of those additions.

    Returns:
        the power for each parameter, and that in each value computed from them.

    Raises:
        NotScalable: no choice of parameters does; the message is the reason.
    """
    branches, stream = list(branches), list(stream)
    try:
        return _powers(graph, span, branches, stream, frozenset())
    except NotScalable as error:
        # A factor that does something else as well (alpha in (1 - alpha) x + alpha f(x)): take what is behind it.
        wanted = set().union(*(last_affines(b) for b in branches))
        shared = frozenset(p for p in wanted if len(graph.readers[p]) > 1)
        if not shared:
            raise
        try:
            return _powers(graph, span, branches, stream, shared)
        except NotScalable:
            raise error from None


def absorbing(graph: ForwardGraph, span: range, node: Node) -> list[Value]:
    """The parameters to divide by s, so that multiplying what ``node`` puts out by s changes nothing behind them.

    Raises:
        NotScalable: something nonlinear, or the end of the block, comes before a linear layer.
    """
    degree: dict[Value, int] = dict.fromkeys(node.outputs, 1)
    result: Powers = {}
    for later in graph.nodes[node.index + 1 : span.stop]:
        if any(degree.get(v, 0) for v in later.inputs):
            degree.update(dict.fromkeys(later.outputs, _degree(later, degree, result)))
    ends = [v for v in degree if degree[v] and not any(reader.index < span.stop for reader in graph.readers.get(v, ()))]
    once = all([span.start <= n.index < span.stop for n in graph.readers[v]] == [True] for v in result)
    if ends or not once:
        raise NotScalable("the factor reaches beyond the block, or what it would be divided by is read elsewhere")
    return list(result)


def _powers(
    graph: ForwardGraph, span: range, branches: list[Value], stream: list[Value], avoid: frozenset[Value]
) -> tuple[Powers, Powers]:
    scaled = set().union(*(last_affines(b, avoid) for b in branches))
    result: Powers = dict.fromkeys(scaled, 1)
    degree: dict[Value, int] = dict.fromkeys(scaled, 1)
    streamed = set(stream)
    # computed parameters (a gain times a constant) may have been computed anywhere before their use
    for node in graph.nodes[: span.stop]:
        if node.index < span.start and not all(v.constant for v in node.inputs):
            continue
        if not any(degree.get(v, 0) for v in node.inputs) or any(v in streamed for v in node.outputs):
            continue
        out = _degree(node, degree, result)
        degree.update(dict.fromkeys(node.outputs, out))
    for branch in branches:
        if degree.get(branch, 0) != 1:
            raise NotScalable("the parameters of its last affine layer do not reach it alone")
    return result, degree


def _degree(node: Node, degree: dict[Value, int], result: Powers) -> int:
    """The power of s in what ``node`` puts out, given those of its inputs; weights that must undo s go to ``result``.

    Raises:
        NotScalable: the output is not a power of s times what it was.
    """

    def of(value: object) -> int:
        return degree.get(value, 0) if isinstance(value, Value) else 0

    name = node.name
    refused = NotScalable(f"{name} reads a scaled tensor ({_where(node)})")
    if name in LAYERS or name in NORMS:
        (first, *rest) = LAYERS.get(name) or NORMS[name]
        weight, *bias = [node.arg(*at) for at in rest]
        biases = [b for b in bias if isinstance(b, Value)]
        if of(node.arg(*first)) == 0:
            if not all(of(b) == of(weight) for b in biases):
                raise refused
            return of(weight)
        if name in NORMS or of(weight) or any(of(b) for b in biases):
            raise refused
        if not isinstance(weight, Value) or not weight.constant:
            raise refused
        for parameter in last_affines(weight):
            if result.setdefault(parameter, -1) != -1:
                raise refused
        return 0
    if name == MULTIHEAD:
        projection = [v for v in (node.arg(11, "out_proj_weight"), node.arg(12, "out_proj_bias")) if v is not None]
        if {of(v) for v in projection} == {1} and not any(of(v) for v in node.inputs if v not in projection):
            return 1
        raise refused
    if name in ATTENTION:
        if of(node.arg(0, "query")) or of(node.arg(1, "key")):
            raise refused
        return of(node.arg(2, "value"))
    if name in JOIN or name in PLUS:
        degrees = {of(v) for v in node.inputs}
        if name in PLUS and len(node.inputs) < 2 and not _adds_zero(node):
            degrees.add(0)  # a literal is added
        if len(degrees) != 1:
            raise refused
        return degrees.pop()
    if name in TIMES:
        total = sum(of(v) for v in node.inputs)
        if total > 1:
            raise refused
        return total
    if name in OVER:
        if any(of(v) for v in node.inputs[1:]):
            raise refused
        return of(node.inputs[0])
    if name in LINEAR or name in POSITIVE:
        if name not in LIKE and any(of(v) for v in node.inputs[1:]):
            raise refused
        return of(node.inputs[0])
    raise refused
