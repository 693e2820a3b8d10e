"""The runs of finetune.json, sorted and compared: what table and picture share."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from recipes.grids.paired import paired

Row = dict[str, Any]


def groups(runs: Sequence[Row]) -> list[tuple[str, int, list[Row]]]:
    """The runs of each network and length as they were made, on the seeds that every arm has seen."""
    keys = dict.fromkeys((r["network"], r["steps"]) for r in runs)
    return [(n, s, whole_seeds([r for r in runs if (r["network"], r["steps"]) == (n, s)])) for n, s in keys]


def by_arm(runs: Sequence[Row], on: str) -> dict[str, list[Row]]:
    """The runs on ``on`` by arm, in the order in which they were made."""
    arms = dict.fromkeys(r["arm"] for r in runs)
    found = {arm: [r for r in runs if (r["arm"], r["on"]) == (arm, on)] for arm in arms}
    return {arm: rows for arm, rows in found.items() if rows}


def whole_seeds(runs: Sequence[Row]) -> list[Row]:
    """The runs without fresh seeds on which some arm has not been trained yet: means are over the same seeds."""
    of = by_arm(runs, "report")
    shared = set.intersection(*({r["seed"] for r in rows} for rows in of.values())) if of else set()
    return [r for r in runs if r["on"] == "tuning" or r["seed"] in shared]


def mean(errors: Sequence[float | None]) -> float:
    """The mean; not a number if a run is missing or diverged."""
    values = [e for e in errors if e is not None]
    return statistics.mean(values) if values and len(values) == len(errors) else math.nan


def best_rate(found: Sequence[tuple[float, float | None]], arm: str) -> float:
    """The rate of the least mean error; a rate at which a run diverged is never it.

    Args:
        found: Rate and error of each run.
        arm: What the runs are of, for the message.

    Raises:
        ValueError: Every rate diverged.
    """
    rates = sorted({rate for rate, _ in found})
    of = {rate: mean([error for at, error in found if at == rate]) for rate in rates}
    of = {rate: value for rate, value in of.items() if math.isfinite(value)}
    if not of:
        raise ValueError(f"{arm} diverged at every rate of {rates}; pass lower --rates")
    return min(of, key=lambda rate: of[rate])


def errors_by_seed(rows: Sequence[Row]) -> dict[int, float]:
    """Errors of the runs that did not diverge, by seed."""
    return {r["seed"]: r["error"] for r in rows if r["error"] is not None}


def against(rows: Sequence[Row], others: Sequence[Row]) -> tuple[float, float] | None:
    """Paired mean difference over the seeds of both and half its 95 % interval; ``None`` without a pair."""
    ours, theirs = errors_by_seed(rows), errors_by_seed(others)
    seeds = sorted(ours.keys() & theirs.keys())
    return paired([ours[s] for s in seeds], [theirs[s] for s in seeds]) if seeds else None
