"""Label propagation: one eager forward pass in which every activation carries the labels of its units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

import torch_meanfield.width.search.layer_rules  # noqa: F401  (registers its rules)
from torch_meanfield.observe import Call, observe, tensors_in
from torch_meanfield.width.search.labels import INPUT, OUTPUT, Ledger, State
from torch_meanfield.width.search.operation_rules import setitem
from torch_meanfield.width.search.rules import RULES


def follow(ledger: Ledger, call: Call) -> None:
    """Follow the labels through one call, by the rule for its name."""
    if call.name == "setitem":  # returns nothing
        if isinstance(call.args[0], Tensor):
            setitem(ledger, call)
        return
    results, inputs = tensors_in(call.result), tensors_in((call.args, call.kwargs))
    if not results or not inputs:
        return
    names = (call.name, call.name.removesuffix("_"), call.name.removesuffix(".default"))
    call = replace(call, name=next((n for n in names if n in RULES), call.name))
    rule = RULES.get(call.name)
    states = [ledger.state(t) for t in inputs]
    sources = history = 0
    for s in states:
        sources, history = sources | s.sources, history | s.history
    tracks: Any = ()
    if any(s.tracks for s in states):
        try:
            tracks = None if rule is None else rule.follow(ledger, call)
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError):
            tracks = None  # called in a way that the rule does not know: as good as an unknown function
    if tracks is None:
        tracks = ()
        for track in (t for s in states for t in s.tracks):
            ledger.freeze(track, f"meets {call.name}, through which labels cannot be followed")
    for result, own in zip(results, tracks if isinstance(tracks, list) else [tracks] * len(results), strict=False):
        state = State(own, sources, history)
        if rule is not None and rule.makes_units(call):
            bit = ledger.new_layer()
            state = State(own, bit, history | bit)
        ledger.put(result, state)


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
        free_groups: See :class:`Ledger`.
        also: Another watcher of the same pass.
    """
    ledger = Ledger(model, free_groups=free_groups)
    for tensor in tensors_in(example_input):
        ledger.put(tensor, State((), 0, INPUT))

    def watch(call: Call) -> None:
        follow(ledger, call)
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
