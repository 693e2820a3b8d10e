"""Losses of a model without some of its blocks; what stands before the block in question is computed once a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn

from torch_meanfield._torch import version_of
from torch_meanfield.observe import run, tensors_in, undisturbed
from torch_meanfield.pruning.batches import Batch, Loss, loss_of
from torch_meanfield.pruning.blocks import Block
from torch_meanfield.pruning.control import controlled, left_out

Key = tuple[str, int]


class Passes:
    """A model that is run without some of its blocks.

    Args:
        model: in the mode it is to be scored in.
        blocks: those that can be left out.
        batches: what it is run on.
        loss: of (outputs, targets).
        caller: named in errors.

    Attributes:
        count: passes so far over all batches, in units of a whole one: of a pass that leaves blocks out or takes what
            they gave before, the share that runs.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch], loss: Loss, caller: str
    ) -> None:
        self.model, self.blocks, self.batches, self.loss, self.caller = model, blocks, batches, loss, caller
        self.count = 0.0
        self._written = False  # the model writes into what its blocks put out
        self._plain: set[Key] = set()  # parts known to put out the stream and nothing else

    def losses_without(
        self, gone: Collection[str], candidates: Sequence[Block], told: Callable[[], None] = lambda: None
    ) -> tuple[float, dict[str, float]]:
        """The mean loss without the blocks ``gone``, and without each of ``candidates`` besides.

        Args:
            gone: names.
            candidates: blocks that are not gone.
            told: called after each pass of a batch.
        """
        total, samples = 0.0, 0
        without = dict.fromkeys((b.name for b in candidates), 0.0)
        for batch in self.batches:
            samples += batch.size
            base = _Recorded({*gone}, self._plain, copies=self._written)
            value = self._loss(batch, base)
            if not self._written and base.was_written():
                self._written = True
                base = _Recorded({*gone}, self._plain, copies=True)
                value = self._loss(batch, base)
            total += value * batch.size
            self._tell(len(self.blocks) - len(gone), told)
            running = [name for name in base.order if name not in gone]
            for block in candidates:
                value = self._loss(batch, _Without({*gone, block.name}, block.name, base))
                without[block.name] += value * batch.size
                before = running.index(block.name) + 1 if block.name in running else 0
                self._tell(len(running) - before, told)
        return total / samples, {name: value / samples for name, value in without.items()}

    def _tell(self, blocks: int, told: Callable[[], None]) -> None:
        self.count += blocks / len(self.blocks) / len(self.batches)
        told()

    def _loss(self, batch: Batch, act: Any) -> float:
        with undisturbed(), controlled(self.model, self.blocks, act):
            outputs = run(self.model, batch.inputs)
            value = float(loss_of(self.loss, outputs, batch.targets, self.caller))
        return value if not math.isnan(value) else math.inf


class _Recorded:
    """Runs every block but those that are gone, and keeps what each part puts out."""

    def __init__(self, gone: set[str], plain: set[Key], copies: bool) -> None:
        self.gone, self.plain, self.copies = gone, plain, copies
        self.outputs: dict[Key, Any] = {}
        self.versions: list[tuple[Tensor, int]] = []
        self.order: list[str] = []

    def __call__(self, block: Block, i: int, x: Tensor, forward: Callable[[], Any]) -> Any:
        if block.name not in self.order:
            self.order.append(block.name)
        if block.name in self.gone and (block.name, i) in self.plain:
            self.outputs[block.name, i] = x
            return x
        out = forward()
        self.outputs[block.name, i] = _copied(out) if self.copies else out
        if block.outside[i] is False and isinstance(out, Tensor):
            self.plain.add((block.name, i))
        if block.name in self.gone:  # what it would have put out tells of what kind that is
            return left_out(block, i, x, out)
        self.versions += [(t, version_of(t)) for t in tensors_in(out)]
        return out

    def was_written(self) -> bool:
        """Whether something the blocks have put out was written to afterwards."""
        return any(version_of(t) != version for t, version in self.versions)


class _Without:
    """Leaves ``gone`` out; blocks before the first of interest give what they gave in the pass that was recorded."""

    def __init__(self, gone: set[str], first: str, base: _Recorded) -> None:
        self.gone, self.base = gone, base
        self.before = {*base.order[: base.order.index(first)]} if first in base.order else set()

    def __call__(self, block: Block, i: int, x: Tensor, forward: Callable[[], Any]) -> Any:
        known = self.base.outputs[block.name, i]
        if block.name in self.gone:
            return left_out(block, i, x, known)
        if block.name in self.before:
            return _copied(known) if self.base.copies else known
        return forward()


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return type(value)([_copied(v) for v in value]) if type(value) in (tuple, list) else value
