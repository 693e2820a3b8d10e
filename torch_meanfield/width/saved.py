"""What birth and death add to a checkpoint, checked in full before anything is loaded."""

from __future__ import annotations

from typing import Any

import torch

from torch_meanfield.width.dynamics import Dynamics
from torch_meanfield.width.laws import Law

KEY = "birth_death"
VERSION = 2


def pack(dynamics: Dynamics | None, clock: int, generator: torch.Generator) -> dict[str, Any]:
    """Clock, generator and, for each population, averages, time, laws and what has been recorded for the next event.

    Plain containers, numbers and tensors only, so that ``torch.load(weights_only=True)`` reads it.
    """
    populations = []
    for i, population in enumerate([] if dynamics is None else dynamics.populations):
        assert dynamics is not None
        averages, j = dynamics.where[i]
        recorder = dynamics.recorders.get(i)
        populations.append(
            {
                "name": population.name,
                "size": population.size,
                "averages": averages.of(j).clone(),
                "elapsed": dynamics.elapsed[i],
                "laws": {k: [law.mean, law.spread, law.uniform] for k, law in dynamics.laws[i].items()},
                "recorded": recorder.state() if recorder is not None and recorder.wanted else None,
            }
        )
    return {
        "version": VERSION,
        "clock": clock,
        "generator": generator.get_state(),
        "batch": None if dynamics is None else dynamics.batch.state(),
        "populations": populations if dynamics is not None else None,
    }


def check_version(saved: Any) -> None:
    """Raise ``ValueError`` for something that :func:`pack` of this version did not make."""
    if not isinstance(saved, dict) or not {"version", "clock", "generator", "populations"} <= saved.keys():
        raise ValueError(
            f"state_dict[{KEY!r}] is not what BirthDeathOptimizer.state_dict() makes; was the file changed?"
        )
    if saved["version"] != VERSION:
        raise ValueError(
            f"state_dict[{KEY!r}] has version {saved['version']!r}, this library reads {VERSION}; load the wrapped "
            f"optimizer alone by removing the key {KEY!r}"
        )


def check(saved: dict[str, Any], dynamics: Dynamics) -> None:
    """Raise ``ValueError`` unless ``saved`` belongs to populations like these. Changes nothing."""
    if saved["populations"] is None:
        return
    theirs = [(p["name"], p["size"]) for p in saved["populations"]]
    ours = [(p.name, p.size) for p in dynamics.populations]
    if theirs != ours:
        differ = next(((a, b) for a, b in zip(theirs, ours, strict=False) if a != b), (theirs[-1:], ours[-1:]))
        raise ValueError(
            f"state_dict[{KEY!r}] is of another model: it holds {len(theirs)} populations, this one has {len(ours)}; "
            f"the first to differ is {differ[0]} against {differ[1]} (name, units). To load the wrapped optimizer "
            f"alone, remove the key {KEY!r}"
        )


def unpack_(saved: dict[str, Any], dynamics: Dynamics) -> None:
    """Load the populations' part, after :func:`check`. Values keep the dtype they were saved in."""
    if saved.get("batch") is not None:
        dynamics.batch.load(saved["batch"])
    for i, entry in enumerate(saved["populations"] or []):
        averages, j = dynamics.where[i]
        averages.of(j).copy_(entry["averages"])
        dynamics.elapsed[i] = entry["elapsed"]
        dynamics.laws[i] = {int(k): Law(*law) for k, law in entry["laws"].items()}
        recorder = dynamics.recorders.get(i)
        if recorder is not None:
            recorder.stop()
            if entry["recorded"] is not None:
                recorder.load(_to(entry["recorded"], averages.device))


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [_to(v, device) for v in value]
    return {k: _to(v, device) for k, v in value.items()} if isinstance(value, dict) else value
