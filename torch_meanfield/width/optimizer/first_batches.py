"""Samples that pass a model before it is known which of its layers will count them."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torch_meanfield._torch import in_backward
from torch_meanfield.observe import private_copy, run, tensors_in, undisturbed
from torch_meanfield.width.turnover.batch_size import BatchCounter


class FirstBatches:
    """Counts rows of a model's input as :class:`.BatchCounter` does those of a layer.

    Args:
        model: is called; one of its parameters tells whether gradients have arrived.
    """

    def __init__(self, model: nn.Module) -> None:
        self._ahead = self._behind = 0
        self._parameter = next((p for p in model.parameters() if p.requires_grad and not is_lazy(p)), None)
        self._handle: Any = None
        if self._parameter is not None:
            ours = weakref.ref(self)
            self._handle = cast(Any, self._parameter).register_post_accumulate_grad_hook(lambda _: _arrive(ours()))

    def see(self, inputs: Any) -> None:
        """The model is called with ``inputs``."""
        rows = _rows(inputs)
        if not rows or not torch.is_grad_enabled():
            return
        if not torch.compiler.is_compiling() and in_backward():
            return
        if self._parameter is not None and self._parameter.grad is None:
            self.forget()
        self._ahead += rows

    def forget(self) -> None:
        """Drop the samples whose gradients are thrown away."""
        self._behind = 0

    def stop(self) -> None:
        """Leave no trace in the model."""
        if self._handle is not None:
            self._handle.remove()

    def hand_over(self, batch: BatchCounter, model: nn.Module, example: Any) -> None:
        """Let ``batch`` go on with what would have passed its layer, if it counts."""
        if batch.wanted and batch.module is not None and _rows(example):
            batch.missed((self._ahead + self._behind) * _rows_at(batch.module, model, example) // _rows(example))


def _arrive(counted: FirstBatches | None) -> None:
    if counted is not None:
        counted._behind += counted._ahead
        counted._ahead = 0


def _rows(inputs: Any) -> int:
    if torch.compiler.is_compiling():  # which in torch 2.6 can follow neither the search below nor next()
        args, kwargs = inputs
        for t in (*args, *kwargs.values()):
            if isinstance(t, Tensor) and t.ndim:
                return len(t)
        return 0
    return next((len(t) for t in tensors_in(inputs) if t.ndim), 0)


def _rows_at(layer: nn.Module, model: nn.Module, example: Any) -> int:
    """How many rows the output of ``layer`` has in all when ``model`` is called with ``example``."""
    copy = private_copy(model, share_parameters=True)
    seen: list[int] = []

    def count(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim > 1:
            seen.append(len(output))

    name = next(name for name, module in model.named_modules() if module is layer)
    copy.get_submodule(name).register_forward_hook(count)
    with undisturbed():
        run(copy, example)
    return sum(seen)
