"""Which blocks go: from a number, names or a share of the time, and scores."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from torch_meanfield.pruning.blocks import Block, size_of
from torch_meanfield.pruning.scores import DepthScores


def check_asked(remove: Any, keep: Any, to_latency: Any) -> None:
    """Raise unless exactly one of the three is given, and is of its kind."""
    given = [n for n, v in (("remove", remove), ("keep", keep), ("to_latency", to_latency)) if v is not None]
    if len(given) != 1:
        raise ValueError(
            f"prune_depth_: give one of remove (how many blocks, or their names), keep (likewise) and to_latency (a "
            f"share of the time); got {', '.join(given) or 'none of them'}"
        )
    for name, value in (("remove", remove), ("keep", keep)):
        if value is not None and not _is_count(value) and not _are_names(value):
            raise TypeError(f"prune_depth_: {name} must be a number of blocks or a collection of names, got {value!r}")
    if to_latency is not None:
        number = isinstance(to_latency, (int, float)) and not isinstance(to_latency, bool)
        if not number or not (math.isfinite(to_latency) and 0 < to_latency < 1):
            raise ValueError(
                f"prune_depth_: to_latency must be a share of the present time between 0 and 1, got {to_latency!r}"
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_names(value: Any) -> bool:
    collection = isinstance(value, Collection) and not isinstance(value, (str, Mapping))
    return collection and all(isinstance(name, str) for name in value)


def needs_order(remove: Any, keep: Any, to_latency: Any) -> bool:
    """Whether scores have to say which blocks go."""
    return to_latency is not None or _is_count(remove) or _is_count(keep)


def order_of(scores: Any, blocks: Sequence[Block], model: nn.Module) -> list[Block]:
    """``blocks`` in the order in which they are to go.

    Args:
        scores: a :class:`.DepthScores`, or a number for each name.
        blocks: all blocks of the model.
        model: what they are of.

    Raises:
        TypeError: neither. ValueError: scores of another model, or a score that is no number.
    """
    if isinstance(scores, DepthScores):
        order: Sequence[str] = scores.order
    elif isinstance(scores, Mapping):
        bad = [n for n, v in scores.items() if not isinstance(v, (int, float)) or math.isnan(v)]
        if bad:
            raise ValueError(f"prune_depth_: scores[{bad[0]!r}] is {scores[bad[0]]!r}, which is no number")
        order = sorted(scores, key=lambda name: float(scores[name]))
    else:
        raise TypeError(
            f"prune_depth_: scores must be what depth_scores returned, or a mapping of block names to numbers, got "
            f"{type(scores).__name__}"
        )
    by_name = {b.name: b for b in blocks}
    strange, missing = [n for n in order if n not in by_name], [n for n in by_name if n not in {*order}]
    if strange or missing:
        what = f"block {strange[0]!r}, which it has not" if strange else f"nothing for its block {missing[0]!r}"
        raise ValueError(
            f"prune_depth_: scores are of another model (or were made before it was pruned): they hold {what}; call "
            f"depth_scores(model, ...) on this one"
        )
    for entry in scores.entries if isinstance(scores, DepthScores) else ():
        here = size_of(model, by_name[entry.name])
        if entry.parameters != here:
            raise ValueError(
                f"prune_depth_: scores are of another model: its block {entry.name!r} has {entry.parameters} "
                f"parameters, and that of this model {here}; call depth_scores(model, ...) on this one"
            )
    return [by_name[name] for name in order]


def named(names: Any, blocks: Sequence[Block], argument: str) -> list[Block]:
    """The blocks of these names (of a block of several modules, also the name of one of those).

    Raises:
        ValueError: a name that is no block.
    """
    by_name = {part: b for b in blocks for part in (*b.parts, *b.units, b.name)}
    for name in names:
        if name not in by_name:
            raise ValueError(
                f"prune_depth_: {argument} names {name!r}, which is no block that can be removed; those are "
                f"{', '.join(b.name for b in blocks)}"
            )
    wanted = {by_name[name].name for name in names}
    return [b for b in blocks if b.name in wanted]


def gone_of(remove: Any, keep: Any, order: Sequence[Block] | None, blocks: Sequence[Block]) -> list[Block]:
    """The blocks that go, in the order of the model.

    Raises:
        ValueError: a number out of range; all blocks of the network, or none.
    """
    n = len(blocks)
    if _is_count(remove) or _is_count(keep):
        count = remove if keep is None else n - keep
        argument = f"remove={remove}" if keep is None else f"keep={keep}"
        if not 0 < count < n:
            raise ValueError(
                f"prune_depth_: {argument} of a model of {n} blocks that can be removed; at least one has to go and "
                f"one to stay"
            )
        assert order is not None
        first = {b.name for b in order[:count]}
        return [b for b in blocks if b.name in first]
    argument = "remove" if keep is None else "keep"
    chosen = named(remove if keep is None else keep, blocks, argument)
    gone = chosen if keep is None else [b for b in blocks if b not in chosen]
    if not 0 < len(gone) < n:
        raise ValueError(
            f"prune_depth_: {argument} leaves {n - len(gone)} of {n} blocks; at least one has to go and one to stay"
        )
    return gone
