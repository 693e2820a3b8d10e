"""Residual additions that a module makes around its children: ``for f in self.layers: x = f(x) + x``.

No module of such a loop adds a branch to its own input; the block is what runs between two states of the stream: the
module that puts out the branch, and those before it (a norm).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from torch import nn

from torch_meanfield.convert.blocks import Block, scale_block, shared
from torch_meanfield.convert.description import Reads, describe, is_drop, plain
from torch_meanfield.convert.residual import Addition, local_addition, origin
from torch_meanfield.convert.trace import ForwardGraph, ModuleCall, Node, Value


def loop_runs(model: nn.Module, graph: ForwardGraph, reads: Reads, *, foldable: bool) -> list[list[Block]]:
    """Runs of additions of one module around its children, each to the stream that the one before it left.

    Only runs that repeat a kind of module: the two branches of one transformer block are no loop.

    Args:
        model, graph, reads, foldable: see :func:`.blocks.find_blocks`.
    """
    modules = dict(model.named_modules())
    times = Counter(call.name for call in graph.calls)
    runs: list[list[Block]] = []
    for frame in graph.calls:
        run: list[Block] = []
        for block in _blocks_around(frame, graph, modules, reads):
            if run and origin(block.call.inputs[0]) is not origin(run[-1].call.outputs[0]):
                runs.append(run)
                run = []
            run.append(block)
        runs.append(run)
    runs = [run for run in runs if _repeats(run, modules)]
    for block in (b for run in runs for b in run):
        called = [name for name in block.parts if times[name] > 1]
        if called:
            block.reason = f"{called[0]} is called {times[called[0]]} times in one forward pass"
        block.reason = block.reason or shared(block.parts, model)
        scale_block(block, graph, modules, foldable=foldable)
    return runs


def _repeats(run: list[Block], modules: dict[str, nn.Module]) -> bool:
    kinds = [tuple(type(modules[p]) for p in block.parts) for block in run]
    return len(set(kinds)) < len(kinds)


def _blocks_around(frame: ModuleCall, graph: ForwardGraph, modules: dict[str, nn.Module], reads: Reads) -> list[Block]:
    """A block for each addition that ``frame`` makes itself and whose branch one of its children puts out."""
    found = []
    for node in graph.nodes[frame.start : frame.end] if frame.children else ():
        addition = local_addition(node, frame) if node.module == frame.name else None
        block = None if addition is None else _block(addition, frame, graph, modules, reads)
        found += [] if block is None else [block]
    return found


def _block(
    addition: Addition, frame: ModuleCall, graph: ForwardGraph, modules: dict[str, nn.Module], reads: Reads
) -> Block | None:
    node = addition.node
    stream = node.inputs[1 - node.inputs.index(addition.branch)]
    state, source = origin(stream, frame.start), origin(addition.branch)
    start = frame.start if state.node is None else max(state.node.index + 1, frame.start)
    inside = _between(addition.branch, start)
    calls = [c for c in frame.children if start <= c.start < c.end <= node.index and inside & {*range(c.start, c.end)}]
    maker = next((c for c in calls if source in map(origin, c.outputs) and _holds_tensors(modules[c.name])), None)
    if maker is None:
        return None
    # What a child computes once for all that follow (rotary tables) belongs to none of them.
    context = {
        i for c in calls if c is not maker and _read_after(c.outputs, node, graph) for i in range(c.start, c.end)
    }
    inside = _between(addition.branch, start, context)
    calls = [c for c in calls if inside & {*range(c.start, c.end)}]
    before = tuple(c.name for c in calls if c is not maker and _holds_tensors(modules[c.name]))
    call = ModuleCall(maker.name, [stream], start, list(node.outputs), node.index + 1, [maker])
    block = Block(maker.name, call, [addition], before=before, output=[*map(origin, maker.outputs)].index(source))
    described = [describe(modules[c.name], reads) for c in calls if not is_drop(modules[c.name])]
    for k, each in enumerate(described):
        block.description |= each if len(described) == 1 else {f"{k}.{key}": value for key, value in each.items()}
    nodes = [graph.nodes[i] for i in sorted(inside)]
    own = [(n.name, _literals(n.args), _literals(n.kwargs)) for n in nodes if n.module == frame.name]
    block.description["its place in the loop"] = own
    read = [v for n in nodes for v in n.inputs if v.node is None or v.node.index not in inside]
    inner = tuple(f"{part}." for part in block.parts)
    others = [v.name for v in read if v.kind == "parameter" and not v.name.startswith(inner)]
    if others:
        block.reason = f"its branch reads {others[0]!r}, which belongs to none of the modules that are called in it"
    elif _read_after([v for v in maker.outputs if origin(v) is not source], node, graph):
        block.reason = f"what else {maker.name} puts out is read after its branch is added"
    # Masks and the like stay at the place, so they must be the same at each.
    given = {origin(v): None for v in read if (v.node or v in frame.inputs) and origin(v, frame.start) is not state}
    block.description["what it is called with"] = [call.literals for call in calls] + [
        (v.node.index, v.node.outputs.index(v)) if v.node else frame.inputs.index(v) for v in given
    ]
    return block


def _between(value: Value, start: int, without: Collection[int] = ()) -> set[int]:
    """Indices of the nodes, from ``start`` on, that ``value`` was computed by."""
    found: set[int] = set()
    waiting = [value]
    while waiting:
        node = waiting.pop().node
        if node is not None and node.index >= start and node.index not in found and node.index not in without:
            found.add(node.index)
            waiting += node.inputs
    return found


def _read_after(values: list[Value], node: Node, graph: ForwardGraph) -> bool:
    return any(reader.index > node.index for v in values for reader in graph.readers.get(v, ()))


def _holds_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _literals(given: Any) -> Any:
    if isinstance(given, Value):
        return "a tensor"
    if isinstance(given, dict):
        return {k: _literals(v) for k, v in given.items()}
    return [_literals(v) for v in given] if isinstance(given, (list, tuple)) else plain(given)
