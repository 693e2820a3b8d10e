"""Table and picture of cut networks after fine-tuning, from the runs alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.evidence.rows import against, errors_by_seed, mean
from recipes.grids.paired import told

Row = dict[str, Any]
Part = tuple[int, str]  # how many blocks are removed, and the arm
OURS = "greedy"  # what the other arms are compared with
PRECISION = {"32": "", "bf16": "; forward passes of the training in bfloat16 by autocast, all else float32"}
ABOUT = {
    "channels": "torch-pruning, as fast as greedy",
    "random": "random blocks, drawn anew for each seed",
    "whole": "nothing removed",
}


def by_part(runs: Sequence[Row], on: str) -> dict[Part, list[Row]]:
    """The runs on ``on`` by number removed and arm, in the order in which they were made."""
    keys = dict.fromkeys((r["removed"], r["arm"]) for r in runs if r["on"] == on)
    return {k: [r for r in runs if (r["removed"], r["arm"], r["on"]) == (*k, on)] for k in keys}


def named(part: Part, document: Row) -> str:
    """How the table calls an arm."""
    arm = part[1]
    about = document["setting"]["sibling"] if arm == "sibling" else ABOUT.get(arm)
    return f"{arm} ({about})" if about else arm


def table(document: Row) -> str:
    """Fresh seeds at each arm's own rate; differences are paired with greedy at the same number removed."""
    of = by_part(document["runs"], "report")
    seeds = sorted({r["seed"] for rows in of.values() for r in rows})
    lines = [
        f"| removed | arm | rate | times faster | parameters | {' | '.join(f'seed {s}' for s in seeds)} | mean "
        f"| minus {OURS}, paired, 95 % | mean on all images | tuning images, rate: error |",
        f"| ---: | --- | ---: | ---: | ---: |{' ---: |' * len(seeds)} ---: | ---: | ---: | --- |",
    ]
    tuning = by_part(document["runs"], "tuning")
    for part, rows in of.items():
        errors, others = errors_by_seed(rows), of.get((part[0], OURS), [])
        difference = None if part[1] == OURS or part[0] == 0 else against(rows, others)
        rates = ", ".join(f"{r['rate']:g}: {told_error(r['error'])}" for r in tuning.get(part, []))
        faster = statistics.mean(r["faster"] for r in rows)
        lines.append(
            f"| {part[0]} | {named(part, document)} | {rows[0]['rate']:g} | {faster:.2f} "
            f"| {round(statistics.mean(r['parameters'] for r in rows)):,} "
            f"| {' | '.join(f'{errors[s]:.2f}' if s in errors else '' for s in seeds)} "
            f"| {told_error(mean([r['error'] for r in rows]))} | {told(*difference) if difference else ''} "
            f"| {told_error(mean([r['all'] for r in rows]))} | {rates} |"
        )
    return "\n".join(lines) + "\n"


def told_error(value: float | None) -> str:
    """Two digits, or that there is no number."""
    return "diverged" if value is None or not math.isfinite(value) else f"{value:.2f}"


def channels_said(document: Row) -> str:
    """How channels were cut, in words."""
    said = []
    for count, ways in document["channels"].items():
        best = min(ways, key=lambda w: w["loss"])
        each = "; ".join(f"{w['way']}: ratio {w['ratio']:.3f}, loss {w['loss']:.3f}" for w in ways)
        said.append(
            f"- channels, as fast as without {count} blocks: {best['way']} was taken, of the least loss on the scoring "
            f"images before fine-tuning ({each})."
        )
    return "\n".join(said)


def _rates_said(document: Row) -> str:
    tuning = [r for r in document["runs"] if r["on"] == "tuning"]
    images, seeds = document["tuning_images"], ", ".join(str(s) for s in sorted({r["seed"] for r in tuning}))
    rates = sorted({r["rate"] for r in tuning})
    if len(rates) > 1:
        return f"Rates were chosen on {images:,} test images (seed {seeds})"
    return f"One rate for all arms, {rates[0]:g}, not tuned; seed {seeds} on {images:,} test images"


def report(document: Row) -> str:
    """The whole text, from the JSON alone."""
    s, runs, whole = document["setting"], document["runs"], document["whole"]
    steps = sorted({r["steps"] for r in runs})
    hours = sum(r["seconds"] for r in runs) / 3600
    return "\n".join(
        [
            f"{s['network']} on {document['data']}: adapted by {s['adapt']} steps at rate {s['adapt_rate']:g}, then "
            f"cut, then fine-tuned by {', '.join(map(str, steps))} steps (batch 128, SGD with momentum 0.9, weight "
            f"decay 1e-4, half a cosine to 0, mirrored images{PRECISION[s['precision']]}). Blocks are scored, norms "
            f"re-estimated, on {s['scored']} training images. {_rates_said(document)}; errors in % are those on other "
            f"{document['test_images']:,}, and on all. The adapted network as it is: {whole['error']:.2f}, on all "
            f"{whole['all']:.2f}. Times faster: processor time of a forward pass, float32, networks taking turns.\n",
            table(document),
            f"{channels_said(document)}\n" if document["channels"] else "",
            f"Made by `{document['command']}` in {hours:.1f} hours of processor time: {document['device']}, "
            f"{document['threads']} thread, torch {document['versions']['torch']}, commit {document['commit']}.\n",
        ]
    )


def draw(path: Path, document: Row) -> None:
    """Error after fine-tuning against the time of a forward pass, a point for each seed and a bar for the mean.

    Args:
        path: Path of the PNG.
        document: What :mod:`recipes.evidence.cuts` wrote.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5))
    arms = list(dict.fromkeys(r["arm"] for r in document["runs"]))
    for part, rows in by_part(document["runs"], "report").items():
        points = [(100 / r["faster"], r["error"]) for r in rows if r["error"] is not None]
        if not points:
            continue
        colour, (x, y) = f"C{arms.index(part[1])}", zip(*points, strict=True)
        axis.plot(x, y, "o", color=colour, alpha=0.4, markersize=4)
        label = named(part, document) + (f", {part[0]} removed" if part[0] else "")
        axis.plot([statistics.mean(x)], [statistics.mean(y)], "D", color=colour, markersize=8, label=label)
    axis.axhline(document["whole"]["error"], color="0.6", linewidth=1, label="adapted network, not cut")
    axis.set(xlabel="time of a forward pass, % of the whole network's", ylabel="test error, %")
    axis.set(title=f"{document['setting']['network']} on {document['data']}, each point a seed")
    axis.set_xlim(left=0)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
