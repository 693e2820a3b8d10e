"""Table and picture of elastic depth, from the runs alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCRATCH = "T = n, fixed"  # a vanilla network, trained anew at each depth
Row = dict[str, Any]


def curves(runs: Sequence[Row], blocks: int) -> dict[str, dict[int, list[float]]]:
    """Errors by number of blocks kept, a list over seeds, for each way and criterion; and trained at each depth."""
    found: dict[str, dict[int, list[float]]] = {}
    for run in (r for r in runs if r["blocks"] == blocks):
        for by, errors in run["errors"].items():
            curve = found.setdefault(f"{run['way']}; by {by}", {})
            for kept, error in errors.items():
                curve.setdefault(int(kept), []).append(error)
    scratch: dict[int, list[float]] = {}
    for run in (r for r in runs if r["way"] == SCRATCH):
        whole = next(iter(run["errors"].values()), {}).get(str(run["blocks"]))
        if whole is not None:
            scratch.setdefault(run["blocks"], []).append(whole)
    if len(scratch) > 1:
        found["trained at each depth"] = scratch
    return found


def table(runs: Sequence[Row], blocks: int) -> str:
    """Mean test error in percent by blocks kept; under it what each way's steps say."""
    found = curves(runs, blocks)
    kept = sorted({k for curve in found.values() for k in curve}, reverse=True)
    lines = [
        f"| trained; blocks removed | {' | '.join(f'{k} blocks' for k in kept)} | seeds |",
        f"| --- |{' ---: |' * (len(kept) + 1)}",
    ]
    for name, curve in found.items():
        cells = [f"{statistics.mean(curve[k]):.2f}" if k in curve else "" for k in kept]
        lines.append(f"| {name} | {' | '.join(cells)} | {min(len(e) for e in curve.values())} |")
    said = []
    for way in dict.fromkeys(r["way"] for r in runs):
        some = [r for r in runs if r["way"] == way and r["blocks"] == blocks and r["agreement"] is not None]
        if some:
            values = ", ".join(f"{r['agreement']:.2f}" for r in some)
            steps = sorted(s for r in some for s in r["steps"])
            said.append(
                f"- {way}: Spearman of step and leave-one-out {values}; steps {steps[0]:.2f} to {steps[-1]:.2f}."
            )
    return "\n".join([*lines, "", *said]) + "\n"


def draw(path: Path, document: Row) -> None:
    """Left the error against blocks kept; right against the milliseconds of a forward pass with so many.

    Args:
        path: Path of the PNG.
        document: What the recipe writes to elastic_depth.json.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), sharey=True)
    milliseconds = {int(k): v for k, v in document["milliseconds"].items()}
    for name, curve in curves(document["runs"], document["blocks"]).items():
        wide = 2.6 if name == "trained at each depth" or name.endswith("by step") else 1.2
        kept = sorted(curve)
        means = [statistics.mean(curve[k]) for k in kept]
        axes[0].plot(kept, means, "o-", markersize=3, linewidth=wide, label=name)
        timed = [(milliseconds[k], m) for k, m in zip(kept, means, strict=True) if k in milliseconds]
        axes[1].plot(*zip(*timed, strict=True), "o-", markersize=3, linewidth=wide)
    axes[0].set(
        xlabel="blocks kept", ylabel="test error, %", title=f"{document['data']}, nothing trained after removal"
    )
    axes[0].legend(fontsize=7)
    axes[1].set(xlabel="ms a batch of 128", title="the same against time")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
