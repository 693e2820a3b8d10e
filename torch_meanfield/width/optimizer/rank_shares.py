"""What each data-parallel rank has seen for itself before an event, and how another number of ranks shares it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_meanfield.particles.ranks import world


def share_of(saved: dict[str, Any]) -> dict[str, Any]:
    """What this rank goes on from: its own part, or where there were more or fewer ranks, its share of all parts.

    Args:
        saved: the checked entry of a checkpoint. Where ``"ranks"`` is ``None`` it holds one rank's part, and the others
            are taken to have seen as much.

    Returns:
        ``"batch"``, the samples counted, and ``"recorded"``, for each population the rows, if any.
    """
    rank, ranks = world()
    parts: list[dict[str, Any]] = saved["ranks"] or [
        {"batch": saved["batch"], "recorded": [entry["recorded"] for entry in saved["populations"]]}
    ]
    known, before = len(parts), saved["world_size"]
    if ranks == before:
        return parts[rank if known == before else 0]
    _, steps, wanted = parts[0]["batch"]
    samples = sum(part["batch"][0] for part in parts) * before // known
    mine = samples // ranks + (rank < samples % ranks)
    recorded = [_shared(list(states), rank, ranks) for states in zip(*(p["recorded"] for p in parts), strict=True)]
    return {"batch": [mine, steps, wanted], "recorded": recorded}


def _shared(states: list[dict[str, Any] | None], rank: int, ranks: int) -> dict[str, Any] | None:
    """This rank's share of the rows in each recorded pass; all ranks together have each row once."""
    seen = [state for state in states if state is not None]
    if not seen:
        return None
    out: dict[str, Any] = {}
    for name in ("inputs", "gradients"):
        # a pass that not all ranks have seen is left out
        passes = [torch.cat(rows) for rows in zip(*(state[name] for state in seen), strict=False)]
        out[name] = [_rows(rows, rank, ranks) for rows in passes]
    for name in ("before", "after"):
        out[name] = next((state[name] for state in seen if state[name] is not None), None)
    return out


def _rows(rows: Tensor, rank: int, ranks: int) -> Tensor:
    return rows.tensor_split(ranks)[rank] if len(rows) >= ranks else rows
