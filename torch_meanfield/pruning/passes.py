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
ROOM = 2**30  # bytes of what blocks put out that are kept from one round of a search to the next


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
        self._kept: dict[int, _Recorded] = {}  # by number of the batch, the last one
        self._room = ROOM

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
        for i, batch in enumerate(self.batches):
            samples += batch.size
            base = self._base(i, batch, frozenset(gone))
            total += base.loss * batch.size
            told()
            for block in candidates:
                act = _Without(base.gone | {block.name}, block.name, base)
                without[block.name] += self._loss(batch, act) * batch.size
                told()
        return total / samples, {name: value / samples for name, value in without.items()}

    def _base(self, i: int, batch: Batch, gone: frozenset[str]) -> _Recorded:
        """The pass without ``gone``; of one that is kept, of a network with more blocks, what has not changed."""
        known = self._kept.pop(i, None)
        if known is not None and known.gone == gone:
            base = known
        else:
            base = _Recorded(gone, self._plain, self._written, known)
            base.loss = self._loss(batch, base)
            if not self._written and base.was_written():
                self._written = True
                self._kept.clear()
                base = _Recorded(gone, self._plain, True, None)
                base.loss = self._loss(batch, base)
        if len(self._kept) * base.bytes <= self._room - base.bytes:
            self._kept[i] = base
        return base

    def _loss(self, batch: Batch, act: _Recorded | _Without) -> float:
        with undisturbed(), controlled(self.model, self.blocks, act):
            outputs = run(self.model, batch.inputs)
            value = float(loss_of(self.loss, outputs, batch.targets, self.caller))
        self.count += len(act.ran) / len(self.blocks) / len(self.batches)
        return value if not math.isnan(value) else math.inf


class _Recorded:
    """Runs every block but those that are gone, and keeps what each part puts out.

    Args:
        gone: names.
        plain: parts that are known to put out the stream alone; those that are seen to are added.
        copies: whether to keep copies.
        known: of a network of which only some have gone; what stands before the first of the others is taken from it.
    """

    def __init__(self, gone: frozenset[str], plain: set[Key], copies: bool, known: _Recorded | None) -> None:
        self.gone, self.plain, self.copies = gone, plain, copies
        self.outputs: dict[Key, Any] = {}
        self.order: list[str] = []
        self.ran: set[str] = set()
        self.loss = math.nan
        self._versions: list[tuple[Tensor, int]] = []
        self._known: dict[Key, Any] = {}
        if known is not None and known.gone <= gone:
            first = min((known.order.index(n) for n in gone - known.gone if n in known.order), default=0)
            before = {*known.order[:first]}
            self._known = {key: out for key, out in known.outputs.items() if key[0] in before}

    def __call__(self, block: Block, i: int, x: Tensor, forward: Callable[[], Any]) -> Any:
        key = block.name, i
        if block.name not in self.order:
            self.order.append(block.name)
        if key in self._known:
            self.outputs[key] = out = self._known[key]
            return left_out(block, i, x, out) if block.name in self.gone else self._given(out)
        if block.name in self.gone and key in self.plain:
            self.outputs[key] = x
            return x
        self.ran.add(block.name)
        out = forward()
        self.outputs[key] = self._given(out)
        if block.outside[i] is False and isinstance(out, Tensor):
            self.plain.add(key)
        if block.name in self.gone:  # what it would have put out tells of what kind that is
            return left_out(block, i, x, out)
        self._versions += [(t, version_of(t)) for t in tensors_in(out)]
        return out

    def _given(self, out: Any) -> Any:
        return _copied(out) if self.copies else out

    def was_written(self) -> bool:
        """Whether something the blocks have put out was written to afterwards."""
        return any(version_of(t) != version for t, version in self._versions)

    @property
    def bytes(self) -> int:
        """What is kept takes so much memory."""
        tensors = {id(t): t for out in self.outputs.values() for t in tensors_in(out)}
        return sum(t.numel() * t.element_size() for t in tensors.values())


class _Without:
    """Leaves ``gone`` out; blocks before the first of interest give what they gave in the pass that was recorded."""

    def __init__(self, gone: frozenset[str], first: str, base: _Recorded) -> None:
        self.gone, self.base = gone, base
        self.before = {*base.order[: base.order.index(first)]} if first in base.order else set()
        self.ran: set[str] = set()

    def __call__(self, block: Block, i: int, x: Tensor, forward: Callable[[], Any]) -> Any:
        known = self.base.outputs[block.name, i]
        if block.name in self.gone:
            return left_out(block, i, x, known)
        if block.name in self.before:
            return _copied(known) if self.base.copies else known
        self.ran.add(block.name)
        return forward()


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return type(value)([_copied(v) for v in value]) if type(value) in (tuple, list) else value
