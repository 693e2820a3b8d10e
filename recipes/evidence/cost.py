"""What using the library costs: the figures of the benchmarks in one table, each with its file's command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Line = tuple[str, str, str]  # what, figure, command
FILES = ("step_overhead", "convert_overhead", "birth_death", "small", "lightning_overhead", "importing", "footprint")


def answer(results: Path) -> str | None:
    """The table, of the files that are there; ``None`` without any."""
    found = {name: json.loads((results / f"{name}.json").read_text()) for name in FILES if _is(results, name)}
    if not found:
        return None
    rows = [line for name, document in found.items() for line in LINES[name](document)]
    head = ["| what | figure | measured by |", "| --- | ---: | --- |"]
    made = "; ".join(f"{name}: {d['device']}, torch {d['versions']['torch']}" for name, d in found.items())
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows), "", f"{made}.", ""])


def _is(results: Path, name: str) -> bool:
    return (results / f"{name}.json").is_file()


def _steps(document: dict[str, Any]) -> Iterator[Line]:
    for row in document["rows"]:
        what = f"training step of {row['model']} with learned times / vanilla, batch {row['batch']}"
        yield what, f"{row['ratio']['mean-field']:.3f}", "`benchmarks/step_overhead.py`"


def _converted(document: dict[str, Any]) -> Iterator[Line]:
    command = "`benchmarks/convert_overhead.py`"
    for row in document["rows"]:
        ratios = [row[kind]["ratio"] for kind in ("training step", "folded inference")]
        yield f"{row['model']} converted / plain: training step", f"{ratios[0]:.3f}", command
        yield f"{row['model']} folded / plain: inference", f"{ratios[1]:.3f}", command
    for row in document["conversions"]:
        share = row["lasting_bytes"] / row["weights_bytes"]
        yield f"memory that {row['model']} keeps after `convert`, share of its weights", f"{share:.2%}", command
        yield f"`convert({row['model']})` in forward passes", f"{row['forward passes to convert']:.1f}", command


def _births(document: dict[str, Any]) -> Iterator[Line]:
    for name, row in document["results"].items():
        if "bare" in row:
            what = f"training step of {name} under birth and death / bare"
            yield what, f"{row['ratio']:.3f}", "`benchmarks/birth_death.py`"


def _small(document: dict[str, Any]) -> Iterator[Line]:
    for name, row in document["rows"].items():
        yield f"step of a toy network, {name}", f"{row['ratio']:.2f} (bar {row['bar']})", "`benchmarks/small.py`"


def _lightning(document: dict[str, Any]) -> Iterator[Line]:
    yield "epoch of the Lightning recipe / bare loop", f"{document['ratio']:.3f}", "`benchmarks/lightning_overhead.py`"


def _imports(document: dict[str, Any]) -> Iterator[Line]:
    for name, row in document["rows"].items():
        figure = f"{row['seconds']:.2f} s ({row['seconds_before']:.1f} s)"
        yield f"`import {name}` after (`import {row['after']}`)", figure, "`benchmarks/importing.py`"


def _footprint(document: dict[str, Any]) -> Iterator[Line]:
    command = "`benchmarks/footprint.py`"
    yield "wheel", f"{document['wheel_bytes'] / 1e6:.2f} MB", command
    for name, lines in document["lines"].items():
        yield f"lines to add for `{name}`, the import among them", str(lines), command


LINES = {
    "step_overhead": _steps,
    "convert_overhead": _converted,
    "birth_death": _births,
    "small": _small,
    "lightning_overhead": _lightning,
    "importing": _imports,
    "footprint": _footprint,
}
