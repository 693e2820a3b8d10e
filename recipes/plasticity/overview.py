#!/usr/bin/env python3
"""One table of all plasticity benchmarks, from the results they wrote: the mean of each method, the best in bold.

    python recipes/plasticity/overview.py [--results benchmarks/results] [--methods bare ReDo "library, plastic"]

Where a method has fewer seeds than others of its row, their number stands behind its mean.
"""

from __future__ import annotations

import json
import statistics
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from recipes.errors import BadInput, leave
from recipes.plasticity.training import METHODS

NAMES = {
    "labels": "random labels",
    "permuted": "permuted pixels",
    "stationary": "data that stay",
    "convolutions": "random labels, convolutions",
    "regression": "flipping bits",
    "incremental": "classes that arrive",
}


def overview(results: Path, methods: Sequence[str]) -> str:
    """The table in markdown.

    Raises:
        BadInput: there are no results.
    """
    rows = []
    for name, title in NAMES.items():
        path = results / f"{name}.json"
        runs = json.loads(path.read_text())["runs"] if path.is_file() else []
        for setting in dict.fromkeys(r["setting"] for r in runs):
            rows.append(_row(f"{title}, {setting}", [r for r in runs if r["setting"] == setting], methods))
    if not rows:
        raise BadInput(f"--results {results}: no benchmark has written there; run recipes/plasticity/labels.py first")
    head = ["| | " + " | ".join(methods) + " |", "| --- |" + " ---: |" * len(methods)]
    return "\n".join([*head, *rows]) + "\n"


def _row(title: str, runs: Sequence[dict[str, Any]], methods: Sequence[str]) -> str:
    scores = {m: [r["score"] for r in runs if r["method"] == m] for m in methods}
    most = max(len(s) for s in scores.values())
    means = {m: f"{statistics.mean(s):.3f}" for m, s in scores.items() if s}
    cells = []
    for m in methods:
        cell = means.get(m, "")
        cell = f"**{cell}**" if cell and cell == max(means.values()) else cell
        cells.append(f"{cell} ({len(scores[m])})" if 0 < len(scores[m]) < most else cell)
    return f"| {title} ({most} seed{'s' * (most > 1)}) | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    args = parser.parse_args()
    try:
        print(overview(args.results, args.methods), end="")
    except BadInput as error:
        leave("overview.py", error)
