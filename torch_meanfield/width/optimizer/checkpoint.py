"""What birth and death add to a checkpoint: packed, compared with the populations there are, and unpacked."""

from __future__ import annotations

from typing import Any

import torch

from torch_meanfield.observe import map_tensors
from torch_meanfield.particles.ranks import of_all_ranks, world
from torch_meanfield.width.births.initialisers import Initialiser
from torch_meanfield.width.births.recorder import LandscapeRecorder
from torch_meanfield.width.optimizer.entry import KEY as KEY
from torch_meanfield.width.optimizer.entry import VERSION, expect
from torch_meanfield.width.optimizer.entry import check_entry as check_entry
from torch_meanfield.width.optimizer.rank_shares import share_of
from torch_meanfield.width.turnover.dynamics import Dynamics
from torch_meanfield.width.turnover.tracked import Tracked


def pack(dynamics: Dynamics | None, clock: int, generator: torch.Generator) -> dict[str, Any]:
    """Clock, generator and, for each population, what is known of it and recorded for the next event.

    Plain containers, numbers and tensors only, so that ``torch.load(weights_only=True)`` reads it. The samples counted
    and the rows recorded are those of this rank; see :func:`pack_all`.
    """
    return {
        "version": VERSION,
        "clock": clock,
        "generator": generator.get_state(),
        "batch": None if dynamics is None else dynamics.batch.state(),
        "populations": None if dynamics is None else [_packed(each) for each in dynamics.tracked],
        "world_size": world()[1],
        "ranks": None,
    }


def _packed(each: Tracked) -> dict[str, Any]:
    recorder = each.recorder
    return {
        "name": each.name,
        "size": each.population.size,
        "averages": each.rows.clone(),
        "elapsed": each.elapsed,
        "initialisers": {k: [v.mean, v.spread, v.uniform] for k, v in each.initialisers.items()},
        "recorded": recorder.state() if recorder is not None and recorder.wanted else None,
    }


def pack_all(packed: dict[str, Any]) -> dict[str, Any]:
    """What :func:`pack` gave with the parts of all ranks in it, the same on each of them; all must call it."""
    populations = packed["populations"]
    if populations is None:
        return packed
    mine = {"batch": packed["batch"], "recorded": [entry["recorded"] for entry in populations]}
    bare = [{**entry, "recorded": None} for entry in populations]
    # from the CPU: what another rank unpickles would lie on the device it was sent from
    return {**packed, "populations": bare, "ranks": of_all_ranks(_to(torch.device("cpu"), mine))}


def check(saved: dict[str, Any], dynamics: Dynamics) -> None:
    """Raise ``ValueError`` unless ``saved`` belongs to populations like these. Changes nothing."""
    if saved["populations"] is None:
        return
    theirs = [(p["name"], p["size"]) for p in saved["populations"]]
    ours = [(each.name, each.population.size) for each in dynamics.tracked]
    if theirs != ours:
        differ = next(((a, b) for a, b in zip(theirs, ours, strict=False) if a != b), (theirs[-1:], ours[-1:]))
        raise ValueError(
            f"state_dict[{KEY!r}] is of another model: it holds {len(theirs)} populations, this one has {len(ours)}; "
            f"the first to differ is {differ[0]} against {differ[1]} (name, units). To load the wrapped optimizer "
            f"alone, remove the key {KEY!r}"
        )
    for i, (entry, each) in enumerate(zip(saved["populations"], dynamics.tracked, strict=True)):
        where, drawn = f"state_dict[{KEY!r}]['populations'][{i}]", entry["initialisers"]
        expect(drawn.keys() == each.initialisers.keys(), f"{where}['initialisers']", drawn, "of these columns")
        if each.recorder is not None:
            _check_widths(entry["recorded"], each.recorder, f"{where}['recorded']")
            for rank, part in enumerate(saved["ranks"] or ()):
                at = f"state_dict[{KEY!r}]['ranks'][{rank}]['recorded'][{i}]"
                _check_widths(part["recorded"][i], each.recorder, at)


def _check_widths(recorded: dict[str, Any] | None, recorder: LandscapeRecorder, where: str) -> None:
    if recorded is None:
        return
    around = recorder.around
    for name, width in (("inputs", around.incoming.shape[1]), ("gradients", around.outgoing.shape[0])):
        tensors = recorded[name]
        fits = len(tensors) == len(recorded["inputs"])
        fits = fits and all(t.ndim > 1 and t.shape[1] == width for t in tensors)
        expect(fits, f"{where}[{name!r}]", tensors, f"of width {width}, as many as there are inputs")


def unpack_(saved: dict[str, Any], dynamics: Dynamics) -> None:
    """Load the populations' part, after :func:`check`. Values keep the dtype they were saved in."""
    if saved["populations"] is None:  # saved before they were known
        dynamics.begin_anew()
        return
    mine = share_of(saved)
    dynamics.batch.load(mine["batch"])
    for each, entry, recorded in zip(dynamics.tracked, saved["populations"], mine["recorded"], strict=True):
        each.rows.copy_(entry["averages"])
        each.elapsed = entry["elapsed"]
        each.initialisers = {int(k): Initialiser(*v) for k, v in entry["initialisers"].items()}
        if each.recorder is not None:
            each.recorder.drop()
            if recorded is not None:
                each.recorder.load(_to(each.averages.device, recorded))


def _to(device: torch.device, value: Any) -> Any:
    return map_tensors(lambda t: t.to(device), value)
