"""What steep placement must see: inputs of the layer before a population, gradients behind the layer after it.

A hook on the layers exists only while something is recorded.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torch_meanfield._torch import forward_hooks, in_backward, takes_hooks, untransformed
from torch_meanfield.particles.neurons import Neurons
from torch_meanfield.particles.population import homes
from torch_meanfield.particles.ranks import world
from torch_meanfield.width.births.activations import Activation

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Surroundings:
    """The two layers a population lies between, and the norm in the middle if there is one.

    Attributes:
        first: whose outputs the units are.
        last: which reads the units.
        norm: batch norm between them.
        incoming: the weight of ``first`` as the population has it; FSDP2 puts another in its place while it computes.
        outgoing: that of ``last``.
    """

    first: Any
    last: Any
    norm: nn.Module | None
    incoming: Tensor
    outgoing: Tensor

    @property
    def linear(self) -> bool:
        """Two ``Linear`` layers, rather than two convolutions."""
        return isinstance(self.first, nn.Linear)


def surroundings_of(population: Neurons, model: nn.Module | None) -> Surroundings | None:
    """The layers around ``population``, if candidates for it can be tried out there; otherwise ``None``.

    That is two plain ``Linear`` layers, or two ungrouped convolutions, with at most one batch norm between them.
    """
    if model is None:
        return None
    modules = homes(model)
    plain = all(c.outer == c.inner == 1 for c in population.slices(population.columns))
    found = [
        {modules.get(id(c.tensor)) for c in group}
        for group in (population.incoming, population.outgoing, population.own)
    ]
    if not plain or len(found[0]) != 1 or len(population.outgoing) != 1 or len(found[2]) > 1:
        return None
    first, last, norm = next(iter(found[0])), next(iter(found[1])), next(iter(found[2]), None)
    if population.own and not isinstance(norm, NORMS):
        return None
    if not isinstance(first, nn.Module) or not isinstance(last, nn.Module):
        return None
    both_linear = type(first) is nn.Linear and type(last) is nn.Linear
    both_conv = type(first) in CONVOLUTIONS and type(last) is type(first) and first.groups == last.groups == 1
    if not (both_linear or both_conv) or population.outgoing[0].dim != 1 or any(c.dim for c in population.incoming):
        return None
    # biases alone have no candidates
    if (
        all(c.tensor is not first.weight for c in population.incoming)
        or population.outgoing[0].tensor is not last.weight
    ):
        return None
    return Surroundings(first, last, norm, cast(Tensor, first.weight), population.outgoing[0].tensor)


class Tap:
    """A forward hook that calls a method of its recorder; a copy of the model gets one that removes itself.

    Under the compiler it does nothing: what it keeps would break the graph, or compile it anew at every step.
    """

    def __init__(self, recorder: Any = None, method: str = "") -> None:
        self.recorder = None if recorder is None else weakref.ref(recorder)
        self.method = method

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        recorder = None if self.recorder is None else self.recorder()
        if recorder is not None:
            getattr(recorder, self.method)(module, args, output)
            return
        hooks = forward_hooks(module)  # torch iterates over a copy
        for key in [k for k, hook in hooks.items() if hook is self]:
            del hooks[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tap:
        return Tap()

    def __reduce__(self) -> tuple[type[Tap], tuple[()]]:
        return Tap, ()


class LandscapeRecorder:
    """Takes a sample of rows from each forward and backward pass between :meth:`start` and :meth:`stop`.

    Hooks live on the two layers only meanwhile: a copy of the model made at another time carries none. In a compiled
    model, and under ``vmap``, nothing is recorded. Of layers inside an activation checkpoint that pass is which the
    gradients go through: the first without reentrant autograd, the recomputed one with it.

    Args:
        around: the layers.
        limit: about how many rows (tokens, or output positions) to keep in all.
        steps: over how many steps to spread them.
    """

    def __init__(self, around: Surroundings, limit: int, steps: int) -> None:
        self.around, self.share = around, max(1, limit // max(1, steps))
        self.limit = limit
        self.wanted = False
        self.steps = 0  # since it was started, whether anything was seen or not
        self.activation: Activation | None = None  # recognised once
        self.inputs: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.before: Tensor | None = None
        self.after: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        self._pending: list[tuple[Tensor, int]] = []
        self._rows = 0
        self._taken = 0  # how many of the recorded passes belong to steps that were taken
        self._known = False  # whether `before` and `after` do

    def start(self) -> None:
        """Begin anew."""
        self.inputs, self.gradients, self._rows, self._taken, self.wanted = [], [], 0, 0, True
        self.steps = 0
        self.resume()

    def restart(self) -> None:
        """Drop what was recorded and go on recording, if it was."""
        if self.wanted:
            self.start()

    def resume(self) -> None:
        """Put the hooks in place if they should be and are not (after a copy, or after loading)."""
        if not self.wanted or self._handles:
            return
        middle = self.around.norm if self.around.norm is not None else self.around.first
        if not all(takes_hooks(m) for m in (self.around.first, middle, self.around.last)):
            return
        for module, name in ((self.around.first, "_at_first"), (middle, "_at_middle"), (self.around.last, "_at_last")):
            self._handles.append(module.register_forward_hook(Tap(self, name)))

    def drop(self) -> None:
        """Stop, and keep nothing of what was recorded: it is of units or layers that are no longer there."""
        self.stop()
        self.inputs, self.gradients, self._rows, self._taken = [], [], 0, 0
        self.before = self.after = None

    def stop(self) -> None:
        """Leave no trace in the model."""
        self.wanted = False
        for handle in self._handles:
            handle.remove()
        self._handles, self._pending = [], []

    def take(self) -> None:
        """The step is taken whose gradients were recorded last."""
        self.steps += 1
        self._taken, self._known = len(self.gradients), self.after is not None

    def forget(self) -> None:
        """It is not: drop what was recorded since the last one that was."""
        if len(self.gradients) == self._taken:
            return
        del self.inputs[self._taken :], self.gradients[self._taken :]
        self._rows = sum(self._count(g) for g in self.gradients)
        if not self._known:
            self.before = self.after = None

    def state(self) -> dict[str, Any]:
        """What has been recorded so far, of steps that were taken."""
        return {
            "inputs": self.inputs[: self._taken],
            "gradients": self.gradients[: self._taken],
            "before": self.before if self._known else None,
            "after": self.after if self._known else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.start()
        self.inputs, self.gradients = list(state["inputs"]), list(state["gradients"])
        self.before, self.after = state["before"], state["after"]
        self._rows = sum(self._count(g) for g in self.gradients)
        self.take()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": [], "_pending": [], "activation": None}

    def _rows_of(self, x: Tensor) -> Tensor:
        """What is sampled: rows for ``Linear``, whole images for convolutions."""
        x = x.detach()
        return x.reshape(-1, x.shape[-1]) if x.ndim != 2 and self.around.linear else x

    def _stride(self, x: Tensor) -> int:
        """The distance between the rows of ``x`` that are kept: even, so that all ranks keep the same."""
        keep = self.share if self.around.linear else self.share // max(1, x[0, 0].numel())
        return max(1, len(x) // max(1, keep))

    def _at_first(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._pending = []
        if not torch.is_grad_enabled():
            return
        if self.around.outgoing.grad is None and not in_backward():
            self.forget()  # its gradients were thrown away
        if args and isinstance(args[0], Tensor) and self._rows < self.limit:
            given = untransformed(args[0])
            if given is None or (isinstance(output, Tensor) and untransformed(output) is None):
                return
            x = self._rows_of(given)
            stride = self._stride(x)
            self._pending = [(_every(stride, x).clone(), stride)]

    def _at_middle(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._pending and self.before is None and isinstance(output, Tensor):
            self.before = self._few(output)

    def _at_last(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._pending or not isinstance(output, Tensor) or not output.requires_grad:
            return
        if self.after is None and self.before is not None:
            self.after = self._few(args[0])
        inputs, stride = self._pending.pop()

        def keep(gradient: Tensor) -> None:
            gradient = cast(Tensor, untransformed(gradient))
            # The same rows or images as of the input. The loss is the mean over ranks of what each of them computes.
            rows = _every(stride, self._rows_of(gradient)) / world()[1]
            self.inputs.append(inputs)
            self.gradients.append(rows)
            self._rows += self._count(rows)

        cast(Any, output).register_hook(keep)

    def _count(self, rows: Tensor) -> int:
        return len(rows) if self.around.linear else len(rows) * rows[0, 0].numel()

    @staticmethod
    def _few(x: Tensor) -> Tensor:
        """The first few rows, enough to recognise an activation."""
        x = cast(Tensor, untransformed(x)).detach()
        return x.reshape(-1, x.shape[-1])[:16].clone() if x.ndim <= 3 else x[:1].clone()


def _every(stride: int, rows: Tensor) -> Tensor:
    """Every ``stride``-th row, a view; a slice of all of them would cost as much as the copy that is made of it."""
    return rows if stride == 1 else rows[::stride]
