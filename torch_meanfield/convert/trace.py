"""One eager forward pass as a graph: which function made which tensor, inside which module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from torch_meanfield._torch import version_of
from torch_meanfield.observe import Call, observe, tensors_in


@dataclass(eq=False)
class Value:
    """One tensor at one moment: a tensor that is changed in place becomes a new value.

    Attributes:
        node: what made it; ``None`` for a leaf (parameter, buffer, input, or made outside of what is observed).
        name: qualified name of a parameter or buffer.
        kind: ``"parameter"``, ``"buffer"``, ``"leaf"`` or ``"computed"``.
        shape: Shape of the tensor.
        constant: computed from parameters, buffers and literals alone, not from the input.
    """

    shape: tuple[int, ...]
    kind: str
    node: Node | None = None
    name: str = ""
    constant: bool = False


@dataclass(eq=False)
class Node:
    """One call of a torch function.

    Attributes:
        index: position in the order of execution.
        name: plain name, see :class:`torch_meanfield.observe.Call`; without the underscore of in-place functions.
        args, kwargs: as called, each tensor replaced by its :class:`Value`.
        inputs: all values among them, in order.
        outputs: values that came back.
        module: qualified name of the innermost module that was executing.
    """

    index: int
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    module: str

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at ``position``, or called ``name``, or ``default``."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


@dataclass(eq=False)
class ModuleCall:
    """One call of one module: nodes ``start`` to ``end`` (exclusive) ran inside it.

    ``literals`` are its arguments that are numbers, words or ``None``; ``tensors`` those that are or hold tensors, each
    with its value and its version. Both by position or name.
    """

    name: str
    inputs: list[Value]
    start: int
    outputs: list[Value] = field(default_factory=list)
    end: int = 0
    children: list[ModuleCall] = field(default_factory=list)
    literals: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, list[tuple[Value, Tensor, int]]] = field(default_factory=dict)


class ForwardGraph:
    """The recorded graph of one forward pass.

    Attributes:
        nodes: every observed call.
        calls: every module call, in the order in which they began.
        readers: by value, the nodes that take it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.nodes: list[Node] = []
        self.calls: list[ModuleCall] = []
        self.readers: dict[Value, list[Node]] = {}
        self._stack: list[ModuleCall] = []
        self._values: dict[int, Value] = {}
        self._kept: list[Tensor] = []  # a tensor that died could lend its id to another
        for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
            for name, tensor in named:
                self._leaf(tensor, kind, name, constant=True)

    def _leaf(self, tensor: Tensor, kind: str, name: str = "", *, constant: bool = False) -> Value:
        value = Value(tuple(tensor.shape), kind, None, name, constant)
        self._values[id(tensor)] = value
        self._kept.append(tensor)
        return value

    def value(self, tensor: Tensor) -> Value:
        """The present value of ``tensor``."""
        known = self._values.get(id(tensor))
        return self._leaf(tensor, "leaf") if known is None else known

    def replaced(self, thing: Any) -> Any:
        """``thing`` with tensors replaced by values."""
        if isinstance(thing, Tensor):
            return self.value(thing)
        if isinstance(thing, (list, tuple)) and any(True for _ in tensors_in(thing)):
            return [self.replaced(t) for t in thing]
        return thing

    def watch(self, call: Call) -> None:
        """Record one call (for :func:`torch_meanfield.observe.observe`)."""
        results = tensors_in(call.result)
        if call.name == "setitem":  # changes its first argument, returns nothing
            results = tensors_in(call.args[0])
        if not results:
            return
        args = tuple(self.replaced(a) for a in call.args)
        kwargs = {k: self.replaced(v) for k, v in call.kwargs.items()}
        inputs = [self.value(t) for t in (*tensors_in(call.args), *tensors_in(call.kwargs))]
        name = call.name[:-1] if call.name.endswith("_") else call.name
        module = self._stack[-1].name if self._stack else ""
        node = Node(len(self.nodes), name, args, kwargs, inputs, [], module)
        constant = all(v.constant for v in inputs)
        for tensor in results:
            value = Value(tuple(tensor.shape), "computed", node, constant=constant)
            self._values[id(tensor)] = value
            self._kept.append(tensor)
            node.outputs.append(value)
        for value in inputs:
            self.readers.setdefault(value, []).append(node)
        self.nodes.append(node)

    def enter(self, name: str, args: Any, kwargs: Any) -> None:
        """A module is called."""
        inputs = [self.value(t) for t in (*tensors_in(args), *tensors_in(kwargs))]
        call = ModuleCall(name, inputs, len(self.nodes))
        given = {**{str(i): a for i, a in enumerate(args)}, **kwargs}
        call.literals = {k: v for k, v in given.items() if v is None or isinstance(v, (bool, int, float, str))}
        tensors = {k: list(tensors_in(v)) for k, v in given.items()}
        if len(inputs) > 1:  # else it is the stream alone, which need not be kept
            call.tensors = {k: [(self.value(t), t, version_of(t)) for t in ts] for k, ts in tensors.items() if ts}
        if self._stack:
            self._stack[-1].children.append(call)
        self.calls.append(call)
        self._stack.append(call)

    def leave(self, output: Any) -> None:
        """A module returns."""
        call = self._stack.pop()
        call.end = len(self.nodes)
        call.outputs = [self.value(t) for t in tensors_in(output)]


def trace(model: nn.Module, example_input: Any) -> ForwardGraph:
    """Run ``model`` (a private copy) once and record what happens."""
    graph = ForwardGraph(model)
    with _module_hooks(model, graph):
        observe(model, example_input, graph.watch)
    graph._kept.clear()
    graph._values.clear()
    return graph


@contextmanager
def _module_hooks(model: nn.Module, graph: ForwardGraph) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():

        def before(m: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            graph.enter(name, args, kwargs)

        def after(m: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            graph.leave(output)

        handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
