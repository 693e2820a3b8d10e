"""Cut a run of blocks into stages: repetitions of one block, or of several that alternate with a period."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """``repeats`` particles of ``period`` blocks each, from block ``start`` on."""

    start: int
    period: int
    repeats: int


def segments(labels: Sequence[Hashable | None]) -> list[Segment]:
    """From the left, the repetition that covers most blocks, the shorter period first.

    Args:
        labels: one for each block; equal for blocks that can change places, ``None`` for one that must stay.

    Example:
        >>> segments("xaaab"), segments("abababc")
        ([Segment(start=1, period=1, repeats=3)], [Segment(start=0, period=2, repeats=3)])
    """
    found, start = [], 0
    while start < len(labels):
        best = Segment(start, 1, 1)
        for period in range(1, (len(labels) - start) // 2 + 1):
            unit = list(labels[start : start + period])
            if None in unit:
                break
            repeats = 1
            while list(labels[start + repeats * period : start + (repeats + 1) * period]) == unit:
                repeats += 1
            if repeats > 1 and repeats * period > (best.repeats * best.period if best.repeats > 1 else 0):
                best = Segment(start, period, repeats)
        if best.repeats > 1:
            found.append(best)
        start += best.period * best.repeats
    return found
