#!/usr/bin/env python3
"""Fine-tune one backbone plain and mean-field, side by side, on the half of the classes it has never seen.

    python recipes/finetune/table.py --data cifar10 [--root data] [--seeds 3] [--out runs/finetune]
    python recipes/finetune/table.py --data folder:PATH --label NAME --out DIR

A timm model learns the first half of the classes from scratch (that is the pretrained checkpoint), and is fine-tuned on
the other half by `finetune_timm.py`, configuration `configs/finetune/halves.yaml`: plain, mean-field, and mean-field
with larger learning rates of tau. All start from the same weights (a new classifier for each seed) and see the same
batches. Every run ends with a plain checkpoint that was loaded into plain timm and compared. Finished runs are kept:
started again, the script does what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from recipes.errors import BadInput, leave
from recipes.finetune.data import FinetuneData
from recipes.finetune.export import NotTheSame
from recipes.finetune.picture import draw
from recipes.finetune_timm import long_form, run
from recipes.grids.paired import paired, told
from recipes.images.cli import CONFIGS
from recipes.images.source import Images, Source, Split
from recipes.images.sources import open_source
from recipes.quiet import quieten
from recipes.record import DIGITS, provenance, write_json

CONFIG = CONFIGS / "finetune" / "halves.yaml"
PLAIN = "plain"
# What table and picture take from the record of a run; the whole of it lies in runs/.
RENDERED = ("data", "weights", "seconds", "processor_seconds", "resorts", "born", "commit", "epochs", "steps")
RENDERED += ("plain_checkpoint",)

_decoded: dict[tuple[str, str], Images] = {}


class Once(Source):
    """A source whose images are decoded once for all runs of this process."""

    def __init__(self, source: Source) -> None:
        self.name, self.num_classes, self.in_chans = source.name, source.num_classes, source.in_chans
        self.mirror, self._source = source.mirror, source

    def download(self) -> None:
        self._source.download()

    def decode(self, split: Split) -> Images:
        key = (self.name, split)
        if key not in _decoded:
            _decoded[key] = self._source.decode(split)
        return _decoded[key]


class SharedData(FinetuneData):
    """The recipe's data, decoded once."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.source = Once(self.source)


def carried_out(folder: Path, name: str, args: list[str]) -> dict[str, Any]:
    """The record of a run of the recipe: read if it has finished, else made.

    Args:
        folder: Folder of all runs; this one is ``folder/name``.
        name: Name of the run.
        args: The recipe's arguments.

    Raises:
        BadInput: The folder holds a run of this name with other arguments.
    """
    path = folder / f"{name}.json"
    command = " ".join(["python recipes/finetune_timm.py", shlex.join(args)])
    if path.exists():
        record = json.loads(path.read_text())
        if record["command"] != command:
            raise BadInput(f"--out: {path} is of another run ({record['command']}); pass another folder")
        return record
    begin, processor, argv = time.perf_counter(), time.process_time(), sys.argv
    sys.argv = ["finetune_timm.py", *long_form([*args, "--trainer.default_root_dir", str(folder / name)])]
    try:
        cli = run(SharedData)
    finally:
        sys.argv = argv
    log = Path(cli.trainer.log_dir)
    record = {
        "command": command,
        "seconds": round(time.perf_counter() - begin, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
        "folder": str(log.relative_to(folder)),
        **json.loads((log / "run.json").read_text()),
    }
    write_json(path, record)
    print(f"{name}: test error {record['epochs'][-1]['val_error']:.2f} %, {record['seconds']:.0f} s", flush=True)
    return record


def experiment(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, dict[int, dict[str, Any]]]]:
    """All runs: the pretraining, and by method and seed the fine-tunings."""
    classes = open_source(args.data, args.root).num_classes
    if classes < 4:
        raise BadInput(f"--data {args.data} has {classes} classes; halves need at least 4")
    first, second = list(range(classes // 2)), list(range(classes // 2, classes))
    folder = args.out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    common = ["fit", "-c", os.path.relpath(CONFIG), "--data", args.data, "--data.root", str(args.root)]
    common += [*args.more]

    def of(chosen: list[int], seed: int, epochs: int) -> list[str]:
        on = ["--data.classes", json.dumps(chosen, separators=(",", ":")), "--seed_everything", str(seed)]
        return [*common, *on, "--trainer.max_epochs", str(epochs)]

    scratch = ["--plain", "--model.head_epochs", "0", "--model.layer_decay", "1", "--model.lr", str(args.pretrain_lr)]
    pretraining = carried_out(folder, "pretraining", [*of(first, 0, args.pretrain_epochs), *scratch])
    weights = folder / pretraining["folder"] / "plain.pt"
    methods = {PLAIN: ["--plain"]}
    for scale in args.tau_lr:
        methods["mean-field" + ("" if scale == 1 else f", tau lr x{scale:g}")] = ["--model.tau_lr_scale", f"{scale:g}"]
    runs: dict[str, dict[int, dict[str, Any]]] = {method: {} for method in methods}
    for seed in range(args.seeds):
        for method, options in methods.items():
            start = ["--checkpoint", os.path.relpath(weights), "--model.new_head", "true", *options]
            name = f"{method}-{seed}".replace(", ", "-").replace(" ", "_")
            runs[method][seed] = carried_out(folder, name, [*of(second, seed, args.epochs), *start])
    return pretraining, runs


def last_error(record: dict[str, Any]) -> float:
    """Test error after the last epoch, in percent."""
    return record["epochs"][-1]["val_error"]


def against_plain(of: dict[int, dict[str, Any]], plain: dict[int, dict[str, Any]]) -> tuple[float, float]:
    """Mean over the seeds of the error minus that of the plain run, and half its 95 % confidence interval."""
    seeds = sorted(plain)
    return paired([last_error(of[s]) for s in seeds], [last_error(plain[s]) for s in seeds])


def table(label: str, pretraining: dict[str, Any], runs: dict[str, dict[int, dict[str, Any]]]) -> str:
    """The comparison in Markdown."""
    seeds = sorted(runs[PLAIN])
    model, half = pretraining["model"], len(pretraining["epochs"])
    given = ", ".join(f"{k} {v}" for k, v in (model["kwargs"] or {}).items())
    net = model["name"] + (f" ({given})" if given else "")
    before, more = last_error(pretraining), len(runs[PLAIN][seeds[0]]["epochs"])
    lines = [
        f"{net} on {label}: {half} epochs on the first half of the classes (test error {before:.2f} %), then {more} of "
        f"fine-tuning on the other half. Its test error in % after the last epoch:",
        "",
        f"| fine-tuned | {' | '.join(f'seed {s}' for s in seeds)} | mean | minus plain, paired, 95 % | re-sorts | step "
        f"sizes at the end | plain checkpoint, relative error |",
        f"| --- |{' ---: |' * (len(seeds) + 1)} ---: | ---: | --- | ---: |",
    ]
    for method, of in runs.items():
        errors = [last_error(of[s]) for s in seeds]
        mean, half_width = against_plain(of, runs[PLAIN])
        steps = [x for s in seeds for stage in of[s]["steps"].values() for x in stage]
        lines.append(
            f"| {method} | {' | '.join(f'{e:.2f}' for e in errors)} | {sum(errors) / len(errors):.2f} "
            f"| {'' if method == PLAIN else told(mean, half_width)} "
            f"| {', '.join(str(of[s]['resorts']) for s in seeds) if steps else ''} "
            f"| {f'{min(steps):.2f} to {max(steps):.2f}' if steps else ''} "
            f"| {max(of[s]['plain_checkpoint']['error'] for s in seeds):.0e} |"
        )
    return "\n".join([*lines, "", *remarks(runs)]) + "\n"


def remarks(runs: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """What the figures say, in words."""
    seeds = sorted(runs[PLAIN])
    said = []
    for method, of in runs.items():
        if method == PLAIN:
            continue
        mean, half_width = against_plain(of, runs[PLAIN])
        unsure, n = abs(mean) <= half_width, len(seeds)
        verdict = "not distinguishable from" if unsure else "better than" if mean < 0 else "worse than"
        resorts = sum(of[s]["resorts"] or 0 for s in seeds)
        moved = f"blocks changed places {resorts} times in {n} runs" if resorts else "no two blocks changed places"
        said.append(f"- {method}: {verdict} plain over {n} seeds; {moved}.")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="cifar10", help="digits, fashion-mnist, cifar10, cifar100, or folder:PATH")
    parser.add_argument("--label", help="how the table names the data set; its own name by default")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision keeps what it downloads")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrain-epochs", type=int, default=8)
    parser.add_argument("--pretrain-lr", type=float, default=2e-3)
    parser.add_argument("--epochs", type=int, default=4, help="epochs of fine-tuning, the first of the head alone")
    parser.add_argument("--tau-lr", type=float, nargs="+", default=[1.0, 10.0], help="learning rates of tau, times lr")
    parser.add_argument("--threads", type=int, default=1, help="threads of the processor (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--results", type=Path, help="where table, JSON and picture go; the folder of --out by default")
    parser.add_argument("more", nargs="*", help="further arguments of every run, behind `--`")
    args = parser.parse_args()
    for name in ("seeds", "pretrain_epochs", "epochs", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    quieten(chatter=True)
    torch.set_num_threads(args.threads)
    try:
        pretraining, runs = experiment(args)
    except (BadInput, NotTheSame) as error:
        leave("finetune/table.py", error)
    results = args.results or args.out
    results.mkdir(parents=True, exist_ok=True)
    label = args.label or args.data
    text = table(label, pretraining, runs)
    everything = [pretraining, *(record for of in runs.values() for record in of.values())]
    made = provenance(torch.device("cpu"))
    processor = sum(record["processor_seconds"] for record in everything)
    command = "python " + shlex.join(sys.argv)
    document = {"command": command, "data": label, **made, "processor_seconds": processor}
    document["pretraining"] = {key: pretraining[key] for key in ("model", *RENDERED)}
    document["runs"] = {m: {s: {key: of[s][key] for key in RENDERED} for s in of} for m, of in runs.items()}
    write_json(results / "finetune.json", document, DIGITS)
    foot = (
        f"\nMade by `{command}` in {processor / 60:.0f} minutes of processor time: {made['device']}, {made['threads']} "
        f"thread, torch {made['versions']['torch']}, timm {made['versions']['timm']}, commit {pretraining['commit']}.\n"
    )
    (results / "finetune.md").write_text(text + foot)
    draw(results / "finetune.png", label, {m: list(of.values()) for m, of in runs.items()})
    print(text)


if __name__ == "__main__":
    main()
