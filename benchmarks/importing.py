"""Seconds to import each public module of the package, beside those of what it is imported after.

    python benchmarks/importing.py --repeats 5

Each import is the first of its process. What a module is built on (torch; timm, Lightning where it is for them) is
imported before the clock starts, and timed by itself. Processor time, the median of the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch

if __package__ in (None, ""):  # run as a script: the checkout's packages are found beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import table, written
from recipes.record import provenance

BAR = 0.3
# Each module, and what it is built on.
MODULES = {
    "torch_meanfield": "torch",
    "torch_meanfield.models": "torch",
    "torch_meanfield.convert": "torch",
    "torch_meanfield.width": "torch",
    "torch_meanfield.record": "torch",
    "torch_meanfield.theory": "torch",
    "torch_meanfield.models.timm": "timm",
    "torch_meanfield.lightning": "lightning.pytorch",
}
CHILD = """
import sys, time
a = time.process_time(); __import__(sys.argv[1])
b = time.process_time(); __import__(sys.argv[2])
print(b - a, time.process_time() - b)
"""


def seconds(base: str, module: str) -> tuple[float, float]:
    """Seconds of both imports in a new process."""
    root = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-W", "ignore", "-c", CHILD, base, module]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
    before, ours = map(float, out.splitlines()[-1].split())
    return before, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=list(MODULES), metavar="MODULE")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "importing.json")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in args.modules}
    for r in range(args.repeats):
        for name in runs:
            runs[name].append(seconds(MODULES[name], name))
            print(f"\r  import {r + 1}/{args.repeats}: {name:<30}", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    rows = {}
    for name, pairs in runs.items():
        before, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
        rows[name] = {"after": MODULES[name], "seconds_before": before, "seconds": ours, "bar": BAR}
    lines = [(n, r["after"], f"{r['seconds_before']:.2f}", f"{r['seconds']:.3f}", BAR) for n, r in rows.items()]
    print(table(("module", "after", "that, s", "module, s", "at most"), lines))
    written({**provenance(torch.device("cpu")), "repeats": args.repeats, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
