#!/usr/bin/env python3
"""Every peer at the same tuning budget: eight settings each, on random labels of tuning seeds.

    python recipes/plasticity/tuning.py [--root data] [--seeds 1 2] [--methods ReDo UPGD]
                                       [--settings pixels standardised] [--out runs/plasticity]

Random labels as in labels.py, but 20 tasks and seeds that no other table has. The table shows the mean score of the
last 8 tasks at each setting of each method; in bold the best mean over the columns, and *used* is what the benchmarks
run at (peers.py). What is done stays: the same command goes on where it stopped. Commands with other --methods may run
side by side with the same --out; --done then makes the table of all that is there.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from recipes.errors import BadInput, leave
from recipes.images.sources import open_source
from recipes.plasticity.settings import SETTINGS
from recipes.plasticity.streams import STREAMS, inputs
from recipes.plasticity.study import commits, devices, figure
from recipes.plasticity.training import Run, installed, setting_of, train
from recipes.record import DIGITS, provenance, write_json

TASKS = 20


def _grid(names: str, *rows: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [dict(zip(names.split(), row, strict=True)) for row in rows]


# Published values are among them: ReDo's every 1,000 steps, continual backprop's rate of 1e-4 at maturity 100, the
# package's own defaults.
GRIDS: dict[str, list[dict[str, Any]]] = {
    "L2-init": _grid("strength", (1e-5,), (1e-4,), (3e-4,), (1e-3,), (2e-3,), (3e-3,), (1e-2,), (3e-2,)),
    "shrink and perturb": _grid(
        "shrink noise",
        *((3e-4, 3e-3), (1e-4, 1e-2), (3e-4, 1e-2), (1e-3, 1e-2)),
        *((1e-4, 3e-2), (3e-4, 3e-2), (1e-3, 3e-2), (1e-3, 1e-1)),
    ),
    "continual backprop": _grid(
        "rate maturity decay",
        *((1e-4, 100, 0.99), (1e-3, 100, 0.99), (1e-3, 20, 0.99), (3e-3, 100, 0.99)),
        *((3e-3, 20, 0.99), (3e-3, 20, 0.9), (1e-2, 100, 0.99), (1e-2, 20, 0.99)),
    ),
    "ReDo": _grid(
        "threshold every",
        *((0.0, 1), (0.0, 10), (0.0, 100), (0.025, 10)),
        *((0.025, 100), (0.025, 1000), (0.1, 10), (0.1, 100)),
    ),
    "self-normalised resets": _grid(
        "percentile update first",
        *((0.9, 300, 20), (0.95, 300, 20), (0.99, 300, 20), (0.95, 100, 20)),
        *((0.95, 1000, 20), (0.99, 1000, 20), (0.95, 300, 5), (0.95, 300, 100)),
    ),
    "UPGD": _grid(
        "lr noise decay",
        *((0.01, 1e-3, 0.999), (0.03, 1e-3, 0.999), (0.1, 1e-3, 0.999), (0.3, 1e-3, 0.999)),
        *((0.03, 1e-4, 0.999), (0.03, 1e-2, 0.999), (0.1, 1e-2, 0.999), (0.1, 1e-2, 0.99)),
    ),
    "ccbp-pytorch": _grid(
        "continuous reset_interval replacement_rate maturity_steps",
        *((False, 10, 1e-3, 20), (False, 10, 3e-3, 20), (False, 10, 1e-2, 20), (False, 10, 3e-3, 100)),
        *((False, 100, 0.03, 20), (False, 100, 0.03, 100), (True, 100, 0.1, 0), (True, 1000, 0.015, 0)),
    ),
}


@dataclass
class Trial(Run):
    """A run at a setting of its method, in words."""

    options: str = ""


def words(options: Mapping[str, Any]) -> str:
    """Options as the table shows them.

    >>> words({"rate": 0.003, "maturity": 20})
    'rate 0.003, maturity 20'
    """
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in options.items())


def used(method: str, options: Mapping[str, Any]) -> bool:
    """Whether the benchmarks run at these options."""
    own = setting_of(method)
    return all(own[name] == value for name, value in options.items())


def table(trials: Sequence[Trial]) -> str:
    """A markdown table: a row for each method and setting, a column for each network, and the mean of the columns.

    Rows of which a run is missing have no mean and are not compared.
    """
    columns = list(dict.fromkeys(t.setting for t in trials))
    seeds = sorted({t.seed for t in trials})
    lines = [
        "| method | setting | " + " | ".join(columns) + " | mean | |",
        "| --- | --- |" + " ---: |" * (len(columns) + 1) + " --- |",
    ]
    for method, grid in GRIDS.items():
        rows = []
        for options in grid:
            of = [t for t in trials if (t.method, t.options) == (method, words(options))]
            scores = [[t.score for t in of if t.setting == column] for column in columns]
            if of:
                whole = all(len(s) == len(seeds) for s in scores)
                rows.append((options, scores, statistics.mean(statistics.mean(s) for s in scores) if whole else None))
        best = max((mean for _, _, mean in rows if mean is not None), default=None)
        for options, scores, mean in rows:
            cells = [figure(statistics.mean(s)) if s else "" for s in scores]
            last = "" if mean is None else f"**{figure(mean)}**" if mean == best else figure(mean)
            mark = "used" if used(method, options) else ""
            lines.append("| " + " | ".join([method, words(options), *cells, last, mark]) + " |")
    return "\n".join(lines) + "\n"


def tune(args: Namespace) -> None:
    """Run what is not there yet, then write tuning.md and tuning.json to ``args.out``."""
    torch.set_num_threads(1)
    try:
        for absent in (m for m in args.methods if not installed(m)):
            raise BadInput(f"--methods {absent!r}: it is not installed; pip install 'torch-meanfield[studies]'")
        if args.tasks < 1:
            raise BadInput(f"--tasks {args.tasks}: at least 1 task is needed")
        source = open_source(args.data, args.root, 32)
        source.download()
    except BadInput as error:
        leave("tuning.py", error)
    stream, images = replace(STREAMS["labels"], tasks=args.tasks), source.decode("train")
    jobs = [(seed, s, m, o) for seed in args.seeds for m in args.methods for o in GRIDS[m] for s in args.settings]
    trials = []
    for seed, name, method, options in tqdm(jobs, desc="tuning", unit="run"):
        key = "-".join(("tuning", name, method, words(options), str(seed), source.name, str(args.tasks)))
        path = args.out / "runs" / f"{key.replace(' ', '_').replace(',', '')}.json"
        if not path.is_file() and not args.done:
            setting = SETTINGS[name]
            x = inputs(images, setting.standardised, stream.side)
            run = train(stream, setting, method, seed, (x, images.labels), options)
            made = provenance(torch.device("cpu"))
            run.commit, run.device = made["commit"], made["device"]
            write_json(path, asdict(Trial(**asdict(run), options=words(options))))
        if path.is_file():
            trials.append(Trial(**json.loads(path.read_text())))
    if not trials:
        leave("tuning.py", BadInput(f"--done: nothing of this is in {args.out / 'runs'}; run it first"))
    _write(args, trials, source.name)


def _write(args: Namespace, trials: Sequence[Trial], data: str) -> None:
    text = table(trials)
    print(text)
    seeds = [str(s) for s in sorted({t.seed for t in trials})]
    options = ["--settings", *dict.fromkeys(t.setting for t in trials), "--seeds", *seeds, "--tasks", str(args.tasks)]
    methods = [m for m in GRIDS if any(t.method == m for t in trials)]
    options += [] if len(methods) == len(GRIDS) else ["--methods", *methods]
    command = shlex.join(["python", "recipes/plasticity/tuning.py", "--data", args.data, *options])
    runs = [asdict(t) for t in trials]
    document = {"command": command, "data": data, **provenance(torch.device("cpu")), "runs": runs}
    write_json(args.out / "tuning.json", document, DIGITS)
    hours = sum(t.seconds for t in trials) / 3600
    text += f"\nMean of the last 8 of {args.tasks} tasks of random labels, seeds {', '.join(seeds)}. "
    text += f"Made by `{command}` in {hours:.1f} hours of one thread.\n"
    (args.out / "tuning.md").write_text(text + commits(trials) + devices(trials))


def arguments(given: Sequence[str] | None = None) -> Namespace:
    """The command line."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="fashion-mnist", help="digits, fashion-mnist, cifar10, or folder:PATH")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision keeps what it downloads")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    here = [m for m in GRIDS if installed(m)]
    parser.add_argument("--methods", nargs="+", default=here, choices=list(GRIDS), metavar="METHOD")
    columns = ["pixels", "standardised"]
    parser.add_argument("--settings", nargs="+", default=columns, choices=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--tasks", type=int, default=TASKS)
    parser.add_argument("--done", action="store_true", help="run nothing: the table of what is there")
    parser.add_argument("--out", type=Path, default=Path("runs/plasticity"), help="folder of runs and table")
    return parser.parse_args(given)


if __name__ == "__main__":
    tune(arguments())
