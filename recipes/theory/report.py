"""What the theory's recipes share: their options, one JSON, one table, one picture."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recipes.record import DIGITS, provenance, write_json


def arguments(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options all have."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="seed of everything drawn (default %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/theory") / name, help="folder for the table, the JSON and the picture"
    )
    parser.add_argument("--pictures", type=Path, default=None, help="another folder for the picture")
    return parser


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers with four digits."""
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    lines += [f"| {' | '.join(_cell(v) for v in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def figure(columns: int, width: float = 4.6, height: float = 3.6) -> tuple[Any, Any]:
    """A figure with ``columns`` panels side by side, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    made, axes = plt.subplots(1, columns, figsize=(width * columns, height), squeeze=False)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return made, axes[0]


def save(args: argparse.Namespace, name: str, text: str, results: dict[str, Any], picture: Any, begun: float) -> None:
    """Write ``name``.json, .md and .png, and print the table. ``begun`` is of ``time.perf_counter``."""
    from matplotlib import pyplot as plt

    args.out.mkdir(parents=True, exist_ok=True)
    pictures = args.pictures or args.out
    pictures.mkdir(parents=True, exist_ok=True)
    seconds = round(time.perf_counter() - begun, 1)
    command = "python " + shlex.join(sys.argv)
    # A shared machine blurs the wall clock: the processor's time says what the work was.
    busy = round(time.process_time(), 1)
    made = {"command": command, "seconds": seconds, "processor_seconds": busy, **provenance(torch.device("cpu"))}
    write_json(args.out / f"{name}.json", {**made, **results}, DIGITS)
    (args.out / f"{name}.md").write_text(
        f"{text}\nMade by `{command}` in {seconds:.0f} s ({busy:.0f} s of processor time) on {made['device']}.\n"
    )
    if picture.get_layout_engine() is None:
        picture.tight_layout()
    picture.savefig(pictures / f"{name}.png", dpi=80)
    plt.close(picture)
    print(text)
