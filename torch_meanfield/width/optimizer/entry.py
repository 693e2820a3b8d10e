"""The entry that birth and death add to a checkpoint, checked in full, by itself, before anything is loaded."""

from __future__ import annotations

import math
from typing import Any

import torch

KEY = "birth_death"
VERSION = 5
_KEYS = {"version", "clock", "generator", "batch", "populations", "world_size", "ranks"}


def check_entry(saved: Any) -> None:
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
    expect(_is_count(saved["clock"]), f"{where}['clock']", saved["clock"], "a number of steps")
    state = saved["generator"]
    fits = isinstance(state, torch.Tensor) and state.dtype == torch.uint8 and not state.is_meta
    fits = fits and state.shape == torch.Generator().get_state().shape
    expect(fits, f"{where}['generator']", state, "the state of a generator on the CPU")
    try:
        torch.Generator().set_state(state.cpu())
    except RuntimeError as error:
        raise ValueError(f"{where}['generator'] is no state of a generator ({error}); the file is damaged") from error
    populations, batch = saved["populations"], saved["batch"]
    fits = batch is None if populations is None else _is_batch(batch)
    expect(fits, f"{where}['batch']", batch, "three counts")
    expect(populations is None or isinstance(populations, list), f"{where}['populations']", populations, "a list")
    for i, entry in enumerate(populations or ()):
        _check_population(entry, f"{where}['populations'][{i}]")
    size, ranks = saved["world_size"], saved["ranks"]
    expect(_is_count(size) and size > 0, f"{where}['world_size']", size, "a number of processes")
    fits = ranks is None or (isinstance(ranks, list) and len(ranks) == size and populations is not None)
    expect(fits, f"{where}['ranks']", ranks, f"a list of the parts of {size} ranks")
    for rank, part in enumerate(ranks or ()):
        _check_part(part, len(populations), f"{where}['ranks'][{rank}]")


def _check_population(entry: Any, where: str) -> None:
    keys = {"name", "size", "averages", "elapsed", "initialisers", "recorded"}
    fits = isinstance(entry, dict) and keys <= entry.keys()
    expect(fits, where, entry, f"a dict with the keys {', '.join(sorted(keys))}")
    expect(isinstance(entry["name"], str), f"{where}['name']", entry["name"], "a name")
    expect(_is_count(entry["size"]), f"{where}['size']", entry["size"], "a number of units")
    averages = entry["averages"]
    fits = _is_finite(averages) and tuple(averages.shape) == (6, entry["size"])
    expect(fits, f"{where}['averages']", averages, f"finite numbers of shape (6, {entry['size']})")
    elapsed = entry["elapsed"]
    fits = _is_number(elapsed) or (_is_finite(elapsed) and elapsed.numel() == 1)
    expect(fits, f"{where}['elapsed']", elapsed, "a finite number")
    initialisers = entry["initialisers"]
    fits = isinstance(initialisers, dict) and all(_is_count(k) and _is_initialiser(v) for k, v in initialisers.items())
    expect(fits, f"{where}['initialisers']", initialisers, "a mean, a spread and a bool for each column")
    _check_recorded(entry["recorded"], f"{where}['recorded']")


def _check_part(part: Any, populations: int, where: str) -> None:
    fits = isinstance(part, dict) and part.keys() >= {"batch", "recorded"}
    expect(fits, where, part, "a dict with the keys batch, recorded")
    expect(_is_batch(part["batch"]), f"{where}['batch']", part["batch"], "three counts")
    recorded = part["recorded"]
    fits = isinstance(recorded, list) and len(recorded) == populations
    expect(fits, f"{where}['recorded']", recorded, f"a list of {populations}, one for each population")
    for i, each in enumerate(recorded):
        _check_recorded(each, f"{where}['recorded'][{i}]")


def _check_recorded(recorded: Any, where: str) -> None:
    fits = recorded is None or (isinstance(recorded, dict) and {"inputs", "gradients"} <= recorded.keys())
    expect(fits, where, recorded, "what a recorder saved, or None")
    for name in ("inputs", "gradients") if recorded is not None else ():
        fits = isinstance(recorded[name], list) and all(_is_floating(t) for t in recorded[name])
        expect(fits, f"{where}[{name!r}]", recorded[name], "a list of tensors")
    for name in ("before", "after") if recorded is not None else ():
        fits = recorded.get(name) is None or _is_floating(recorded[name])
        expect(name in recorded and fits, f"{where}[{name!r}]", recorded.get(name), "a tensor, or None")


def expect(fits: bool, where: str, value: Any, what: str) -> None:
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


def _is_initialiser(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value)) and value[1] >= 0
