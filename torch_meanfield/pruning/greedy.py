"""Greedy removal: of the blocks that are left, the one without which the loss is least goes next."""

from __future__ import annotations

from collections.abc import Sequence

from torch_meanfield.pruning.blocks import Block
from torch_meanfield.pruning.passes import Passes
from torch_meanfield.pruning.progress import Progress


def greedy_order(
    runs: Passes, blocks: Sequence[Block], progress: Progress
) -> tuple[float, dict[str, float], tuple[str, ...]]:
    """The loss of the whole network, that when each block has gone, and the order in which they go.

    The last block stays: it comes last, with the loss of a network without any.
    """
    left = list(blocks)
    order: list[str] = []
    values: dict[str, float] = {}
    whole = 0.0
    with progress as bar:
        while left:
            base, without = runs.losses_without(order, left)
            whole = whole if order else base
            best = min(left, key=lambda b: without[b.name])
            order.append(best.name)
            values[best.name] = without[best.name]
            left.remove(best)
            bar.update(1)
    return whole, values, tuple(order)
