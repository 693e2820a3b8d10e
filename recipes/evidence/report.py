#!/usr/bin/env python3
"""Table and picture of what finetune.py has done so far.

    python recipes/evidence/report.py runs/evidence/finetune.json [--name learned_steps] [--out benchmarks/results]

Writes NAME.json (the runs), .md and .png to ``--out``. Every figure and every verdict comes from the runs.
"""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from recipes.evidence.picture import draw
from recipes.evidence.rows import Row, against, by_arm, errors_by_seed, groups, mean
from recipes.grids.paired import told
from recipes.record import DIGITS, write_json

NAME = "learned_steps"
MORE = ("learned_steps_deeper", "learned_steps_controls")  # further commands, each with seeds of its own
CONTROL = "scale, no order"
PRECISION = {"32": "", "bf16": "; forward passes of the training in bfloat16 by autocast, all else float32"}


def rates_table(runs: Sequence[Row]) -> str:
    """How rates were chosen: the error on the tuning images by arm and rate, the least of each arm in bold."""
    of, rates = by_arm(runs, "tuning"), sorted({r["rate"] for r in runs if r["on"] == "tuning"})
    lines = [f"| arm | {' | '.join(f'rate {rate:g}' for rate in rates)} |", f"| --- |{' ---: |' * len(rates)}"]
    for arm, rows in of.items():
        found = [[r["error"] for r in rows if r["rate"] == rate] for rate in rates]
        means = [mean(errors) for errors in found]
        least = min((m for m in means if math.isfinite(m)), default=math.nan)
        shown = [f"**{m:.2f}**" if m == least else f"{m:.2f}" if math.isfinite(m) else "diverged" for m in means]
        cells = [text if errors else "" for text, errors in zip(shown, found, strict=True)]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def edges(runs: Sequence[Row]) -> list[str]:
    """The arms whose chosen rate is the lowest or the highest that was tried, in words: a better one may lie beyond."""
    said = []
    for arm, rows in by_arm(runs, "tuning").items():
        rates = sorted({r["rate"] for r in rows})
        of = {rate: mean([r["error"] for r in rows if r["rate"] == rate]) for rate in rates}
        finite = {rate: m for rate, m in of.items() if math.isfinite(m)}
        if finite and (best := min(finite, key=lambda rate: finite[rate])) in (rates[0], rates[-1]):
            said.append(f"{arm} ({'lowest' if best == rates[0] else 'highest'} tried, {best:g})")
    return [f"Best at an edge of the rates, so perhaps better beyond it: {', '.join(said)}.\n"] if said else []


def results_table(runs: Sequence[Row]) -> str:
    """Fresh seeds at each arm's own rate."""
    of = by_arm(runs, "report")
    seeds = sorted({r["seed"] for rows in of.values() for r in rows})
    lines = [
        f"| arm | rate | {' | '.join(f'seed {s}' for s in seeds)} | mean | minus plain, paired, 95 % | minus {CONTROL} "
        f"| training loss, last tenth | re-sorts | steps or factors at the end |",
        f"| --- | ---: |{' ---: |' * len(seeds)} ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for arm, rows in of.items():
        errors = errors_by_seed(rows)
        factors = [f for r in rows for f in r["factors"]]
        differences = [
            "" if arm == other or not (d := against(rows, of.get(other, []))) else told(*d)
            for other in ("plain", CONTROL)
        ]
        lines.append(
            f"| {arm} | {rows[0]['rate']:g} | {' | '.join(f'{errors[s]:.2f}' if s in errors else '' for s in seeds)} "
            f"| {mean([r['error'] for r in rows]):.2f} | {' | '.join(differences)} "
            f"| {mean([r['loss'][-1] for r in rows]):.3f} | {sum(r['resorts'] for r in rows) if factors else ''} "
            f"| {f'{min(factors):.2f} to {max(factors):.2f}' if factors else ''} |"
        )
    return "\n".join(lines) + "\n"


def verdicts(runs: Sequence[Row]) -> list[str]:
    """What the table says of every arm beside plain, in words."""
    of, said = by_arm(runs, "report"), []
    for arm, rows in of.items():
        for other in ("plain", CONTROL):
            found = None if arm in (other, "plain") or other not in of else against(rows, of[other])
            if found is None:
                continue
            difference, half = found
            pairs = len(errors_by_seed(rows).keys() & errors_by_seed(of[other]).keys())
            if abs(difference) <= half:
                verdict = "not distinguishable from"
            else:
                verdict = "better than" if difference < 0 else "worse than"
            ahead = sum(
                errors_by_seed(rows)[s] < e for s, e in errors_by_seed(of[other]).items() if s in errors_by_seed(rows)
            )
            said.append(f"- {arm}: {verdict} {other} ({told(*found)} points; lower in {ahead} of {pairs} pairs).")
    return said


def report(document: dict[str, Any]) -> str:
    """The whole text, from the JSON alone."""
    parts = []
    for network, steps, runs in groups(document["runs"]):
        tuning = sorted({r["seed"] for r in runs if r["on"] == "tuning"})
        parts += [
            f"{network} on {document['data']}, {steps} steps of fine-tuning (batch 128, SGD with momentum 0.9, weight "
            f"decay 1e-4, half a cosine to 0, mirrored images{PRECISION[runs[0]['precision']]}). Test error in % on "
            f"{document['tuning_images']:,} images by which each arm's rate was chosen (seed "
            f"{', '.join(map(str, tuning))}):\n",
            rates_table(runs),
            *edges(runs),
            f"Fresh seeds at that rate; test error in % on the other {document['test_images']:,} images:\n",
            results_table(runs),
            "\n".join(verdicts(runs)) + "\n",
        ]
    hours = sum(r["seconds"] for r in document["runs"]) / 3600
    versions = document["versions"]
    parts.append(
        f"Made by `{document['command']}` in {hours:.1f} hours of processor time: {document['device']}, "
        f"{document['threads']} thread, torch {versions['torch']}, commit {document['commit']}.\n"
    )
    return "\n".join(parts)


def answer(results: Path) -> str | None:
    """The texts of all commands that have a file in ``results``; ``None`` without the first."""
    files = [results / f"{name}.json" for name in (NAME, *MORE)]
    if not files[0].is_file():
        return None
    return "\n".join(report(json.loads(file.read_text())) for file in files if file.is_file())


def main() -> None:
    """The script."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, help="finetune.json, as finetune.py wrote it")
    parser.add_argument("--name", default=NAME, choices=[NAME, *MORE], help="of the files")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    document = json.loads(args.runs.read_text())
    write_json(args.out / f"{args.name}.json", document, DIGITS)
    (args.out / f"{args.name}.md").write_text(report(document))
    draw(args.out / f"{args.name}.png", document)


if __name__ == "__main__":
    main()
