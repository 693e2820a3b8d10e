"""Label propagation: one eager forward pass in which every activation carries the labels of its units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from torch_meanfield.observe import Call, observe, tensors_in
from torch_meanfield.width.search import layer_rules as layers
from torch_meanfield.width.search import operation_rules as rules
from torch_meanfield.observe import functions as operations
from torch_meanfield.width.search.labels import INPUT, OUTPUT, Ledger, State

_CONVS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_LAYERS: dict[str, Callable[..., Any]] = {
    "linear": layers.linear,
    **dict.fromkeys(_CONVS, layers.conv),
    **dict.fromkeys(("matmul", "bmm", "mm", "baddbmm", "addmm", "mv"), layers.matmul),
    "einsum": layers.einsum,
    "scaled_dot_product_attention": layers.attention,
    "multi_head_attention_forward": layers.multi_head_attention,
}
_EMITTING = frozenset(("linear", "multi_head_attention_forward", *_CONVS))
_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(operations.UNARY, rules.unary),
    **dict.fromkeys(operations.NARY, rules.nary),
    **dict.fromkeys(operations.SHAPE, rules.shape),
    **dict.fromkeys(operations.SPATIAL, rules.spatial),
    **dict.fromkeys(operations.CHANNEL_NORMS | operations.LAST_NORMS, rules.norm),
    **dict.fromkeys(operations.SOFT, rules.soft),
    **dict.fromkeys(operations.REDUCE, rules.reduction),
    "group_norm": rules.group_norm,
    "glu": rules.glu,
    "prelu": rules.prelu,
    "cat": rules.cat,
    "concat": rules.cat,
    "concatenate": rules.cat,
    "stack": rules.stack,
    **_LAYERS,
}


class Labels:
    """A watcher for :func:`torch_meanfield.observe.observe` that fills a :class:`Ledger`.

    Args:
        model: the (private copy of the) model that is observed.
        free_groups: the unit of a grouped convolution is the place within each group, instead of the group.
    """

    def __init__(self, model: nn.Module, *, free_groups: bool = False) -> None:
        self.ledger = Ledger(model)
        self.free_groups = free_groups

    def __call__(self, call: Call) -> None:
        """Follow the labels through one call."""
        ledger = self.ledger
        if call.name == "setitem":
            if isinstance(call.args[0], Tensor):
                rules.setitem(ledger, call)
            return
        results = tensors_in(call.result)
        inputs = tensors_in((call.args, call.kwargs))
        if not results or not inputs:
            return
        name = call.name
        if name not in _RULES and name.endswith("_") and name[:-1] in _RULES:
            name = name[:-1]
            call = Call(name, call.func, call.args, call.kwargs, call.result)
        states = [ledger.state(t) for t in inputs]
        sources = history = 0
        for s in states:
            sources, history = sources | s.sources, history | s.history
        labelled = any(s.tracks for s in states)
        tracks = self._apply(name, call, states) if labelled else ()
        each = tracks if isinstance(tracks, list) else [tracks] * len(results)
        for result, own in zip(results, each, strict=False):
            state = State(own, sources, history)
            if name in _EMITTING and not (name in _CONVS and layers.is_depthwise(call)):
                state = layers.layer_state(ledger, call, own, history)
            ledger.put(result, state)

    def _apply(self, name: str, call: Call, states: list[State]) -> Any:
        if name == "copy_":  # x.copy_(y)
            return self.ledger.state(call.args[1]).tracks
        rule = _RULES.get(name)
        kwargs = {"free": True} if self.free_groups and name in _CONVS and "transpose" not in name else {}
        try:
            tracks = None if rule is None else rule(self.ledger, call, **kwargs)
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError):
            tracks = None  # called in a way that the rule does not know: as good as an unknown function
        if tracks is None:
            for s in states:
                for t in s.tracks:
                    self.ledger.freeze(t, f"meets {name}, through which labels cannot be followed")
            return ()
        return tracks


def propagate(
    model: nn.Module,
    example_input: Any,
    *,
    free_groups: bool = False,
    also: Callable[[Call], None] | None = None,
) -> Ledger:
    """Run ``model`` (a private copy) once and return the ledger of its labels.

    What reaches the output is frozen: its order is what the user sees.

    Args:
        free_groups: see :class:`Labels`.
        also: another watcher of the same pass.
    """
    labels = Labels(model, free_groups=free_groups)
    ledger = labels.ledger
    for tensor in tensors_in(example_input):
        ledger.put(tensor, State((), 0, INPUT))

    def watch(call: Call) -> None:
        labels(call)
        if also is not None:
            also(call)

    output = observe(_Fresh(model), example_input, watch)
    for tensor in tensors_in(output):
        for track in ledger.state(tensor).tracks:
            ledger.freeze(track, OUTPUT)
    return ledger


class _Fresh(nn.Module):
    # Some models cache tables computed from parameters (attention biases); switching modes clears or renews the
    # caches, and under the observer's eyes their labels are seen.
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.model.train()
        self.model.eval()
        return self.model(*args, **kwargs)
