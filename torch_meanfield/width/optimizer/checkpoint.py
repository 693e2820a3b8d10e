"""What birth and death add to a checkpoint, checked in full before anything is loaded."""

from __future__ import annotations

import math
from typing import Any

import torch

from torch_meanfield.particles.ranks import of_all_ranks, world
from torch_meanfield.width.births.initialisers import Law
from torch_meanfield.width.births.recorder import Recorder
from torch_meanfield.width.optimizer.per_rank import share_of
from torch_meanfield.width.turnover.dynamics import Dynamics

KEY = "birth_death"
VERSION = 3
_KEYS = {"version", "clock", "generator", "batch", "populations", "world_size", "ranks"}


def pack(dynamics: Dynamics | None, clock: int, generator: torch.Generator) -> dict[str, Any]:
    """Clock, generator and, for each population, averages, time, laws and what has been recorded for the next event.

    Plain containers, numbers and tensors only, so that ``torch.load(weights_only=True)`` reads it. The samples counted
    and the rows recorded are those of this rank; see :func:`pack_all`.
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
        "world_size": world()[1],
        "ranks": None,
    }


def pack_all(packed: dict[str, Any]) -> dict[str, Any]:
    """What :func:`pack` gave with the parts of all ranks in it, the same on each of them; all must call it."""
    populations = packed["populations"]
    if populations is None:
        return packed
    mine = {"batch": packed["batch"], "recorded": [entry["recorded"] for entry in populations]}
    bare = [{**entry, "recorded": None} for entry in populations]
    # from the CPU: what another rank unpickles would lie on the device it was sent from
    return {**packed, "populations": bare, "ranks": of_all_ranks(_to(mine, torch.device("cpu")))}


def check_version(saved: Any) -> None:
    """Raise ``ValueError`` for something that :func:`pack` of this version did not make; the entry is named."""
    version = saved.get("version", VERSION) if isinstance(saved, dict) else VERSION
    if not (isinstance(version, int) and version == VERSION):
        raise ValueError(
            f"state_dict[{KEY!r}] has version {version!r}, this library reads {VERSION}; load the wrapped optimizer "
            f"alone by removing the key {KEY!r}"
        )
    if not isinstance(saved, dict) or not _KEYS <= saved.keys():
        raise ValueError(
            f"state_dict[{KEY!r}] is not what BirthDeathOptimizer.state_dict() makes, a dict with the keys "
            f"{', '.join(sorted(_KEYS))}; was the file changed?"
        )
    where = f"state_dict[{KEY!r}]"
    _expect(_is_count(saved["clock"]), f"{where}['clock']", saved["clock"], "a number of steps")
    state = saved["generator"]
    fits = isinstance(state, torch.Tensor) and state.dtype == torch.uint8 and not state.is_meta
    fits = fits and state.shape == torch.Generator().get_state().shape
    _expect(fits, f"{where}['generator']", state, "the state of a generator on the CPU")
    try:
        torch.Generator().set_state(state.cpu())
    except RuntimeError as error:
        raise ValueError(f"{where}['generator'] is no state of a generator ({error}); the file is damaged") from error
    populations, batch = saved["populations"], saved["batch"]
    fits = batch is None if populations is None else _is_batch(batch)
    _expect(fits, f"{where}['batch']", batch, "three counts")
    _expect(populations is None or isinstance(populations, list), f"{where}['populations']", populations, "a list")
    for i, entry in enumerate(populations or ()):
        _check_entry(entry, f"{where}['populations'][{i}]")
    size, ranks = saved["world_size"], saved["ranks"]
    _expect(_is_count(size) and size > 0, f"{where}['world_size']", size, "a number of processes")
    fits = ranks is None or (isinstance(ranks, list) and len(ranks) == size and populations is not None)
    _expect(fits, f"{where}['ranks']", ranks, f"a list of the parts of {size} ranks")
    for rank, part in enumerate(ranks or ()):
        _check_part(part, len(populations), f"{where}['ranks'][{rank}]")


def _check_entry(entry: Any, where: str) -> None:
    keys = {"name", "size", "averages", "elapsed", "laws", "recorded"}
    fits = isinstance(entry, dict) and keys <= entry.keys()
    _expect(fits, where, entry, f"a dict with the keys {', '.join(sorted(keys))}")
    _expect(isinstance(entry["name"], str), f"{where}['name']", entry["name"], "a name")
    _expect(_is_count(entry["size"]), f"{where}['size']", entry["size"], "a number of units")
    averages = entry["averages"]
    fits = _is_finite(averages) and tuple(averages.shape) == (4, entry["size"])
    _expect(fits, f"{where}['averages']", averages, f"finite numbers of shape (4, {entry['size']})")
    elapsed = entry["elapsed"]
    fits = _is_number(elapsed) or (_is_finite(elapsed) and elapsed.numel() == 1)
    _expect(fits, f"{where}['elapsed']", elapsed, "a finite number")
    laws = entry["laws"]
    fits = isinstance(laws, dict) and all(_is_count(k) and _is_law(law) for k, law in laws.items())
    _expect(fits, f"{where}['laws']", laws, "a mean, a spread and a bool for each column")
    _check_recorded(entry["recorded"], f"{where}['recorded']")


def _check_part(part: Any, populations: int, where: str) -> None:
    fits = isinstance(part, dict) and part.keys() >= {"batch", "recorded"}
    _expect(fits, where, part, "a dict with the keys batch, recorded")
    _expect(_is_batch(part["batch"]), f"{where}['batch']", part["batch"], "three counts")
    recorded = part["recorded"]
    fits = isinstance(recorded, list) and len(recorded) == populations
    _expect(fits, f"{where}['recorded']", recorded, f"a list of {populations}, one for each population")
    for i, each in enumerate(recorded):
        _check_recorded(each, f"{where}['recorded'][{i}]")


def _check_recorded(recorded: Any, where: str) -> None:
    fits = recorded is None or (isinstance(recorded, dict) and {"inputs", "gradients"} <= recorded.keys())
    _expect(fits, where, recorded, "what a recorder saved, or None")
    for name in ("inputs", "gradients") if recorded is not None else ():
        fits = isinstance(recorded[name], list) and all(_is_floating(t) for t in recorded[name])
        _expect(fits, f"{where}[{name!r}]", recorded[name], "a list of tensors")
    for name in ("before", "after") if recorded is not None else ():
        fits = recorded.get(name) is None or _is_floating(recorded[name])
        _expect(name in recorded and fits, f"{where}[{name!r}]", recorded.get(name), "a tensor, or None")


def _expect(fits: bool, where: str, value: Any, what: str) -> None:
    if not fits:
        short = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:60]
        raise ValueError(
            f"{where} must be {what}, got {short}; the file is damaged or of another model. To load the wrapped "
            f"optimizer alone, remove the key {KEY!r}"
        )


def _is_batch(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_count, value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_floating(value: Any) -> bool:
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta
    return plain and bool(value.is_floating_point())


def _is_finite(value: Any) -> bool:
    return _is_floating(value) and bool(value.isfinite().all())


def _is_law(law: Any) -> bool:
    return isinstance(law, list) and len(law) == 3 and all(map(_is_number, law)) and law[1] >= 0


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
    for i, entry in enumerate(saved["populations"]):
        where = f"state_dict[{KEY!r}]['populations'][{i}]"
        _expect(entry["laws"].keys() == dynamics.laws[i].keys(), f"{where}['laws']", entry["laws"], "of these columns")
        recorder = dynamics.recorders.get(i)
        if recorder is not None:
            _check_widths(entry["recorded"], recorder, f"{where}['recorded']")
            for rank, part in enumerate(saved["ranks"] or ()):
                at = f"state_dict[{KEY!r}]['ranks'][{rank}]['recorded'][{i}]"
                _check_widths(part["recorded"][i], recorder, at)


def _check_widths(recorded: dict[str, Any] | None, recorder: Recorder, where: str) -> None:
    read, made = recorder.site.incoming.shape[1], recorder.site.outgoing.shape[0]
    for name, width in (("inputs", read), ("gradients", made)) if recorded is not None else ():
        assert recorded is not None
        tensors = recorded[name]
        fits = len(tensors) == len(recorded["inputs"])
        fits = fits and all(t.ndim > 1 and t.shape[1] == width for t in tensors)
        _expect(fits, f"{where}[{name!r}]", tensors, f"of width {width}, as many as there are inputs")


def unpack_(saved: dict[str, Any], dynamics: Dynamics) -> None:
    """Load the populations' part, after :func:`check`. Values keep the dtype they were saved in."""
    if saved["populations"] is None:  # saved before they were known
        dynamics.begin_anew()
        return
    mine = share_of(saved)
    dynamics.batch.load(mine["batch"])
    for i, (entry, recorded) in enumerate(zip(saved["populations"], mine["recorded"], strict=True)):
        averages, j = dynamics.where[i]
        averages.of(j).copy_(entry["averages"])
        dynamics.elapsed[i] = entry["elapsed"]
        dynamics.laws[i] = {int(k): Law(*law) for k, law in entry["laws"].items()}
        recorder = dynamics.recorders.get(i)
        if recorder is not None:
            recorder.stop()
            if recorded is not None:
                recorder.load(_to(recorded, averages.device))


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [_to(v, device) for v in value]
    return {k: _to(v, device) for k, v in value.items()} if isinstance(value, dict) else value
