"""How tau should be placed and how fast it should learn: horizon, start and learning rate, on real images.

The command line is that of ``recipes/tau_study.py``.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from recipes.errors import BadInput
from recipes.grids.grid import Job, at_once_by_default, carry_out, one_line_endings
from recipes.grids.paired import paired, told
from recipes.grids.tau_picture import draw
from recipes.grids.tau_settings import DEFAULT, Outcome, Setting
from recipes.images.sources import open_source
from recipes.record import DIGITS, write_json

CONFIG = "resnet20-cifar10.yaml"
VANILLA = "vanilla"
STARTS = ("uniform", "random")
SCALES = (0.1, 1.0, 10.0, 100.0)


def settings(depth: int) -> list[Setting]:
    """All of them. The middle horizon is the square root of the number of blocks in a stage, rounded."""
    blocks = (depth - 2) // 6
    horizons = (1.0, float(max(2, round(math.sqrt(blocks)))), None)
    return [Setting(*each) for each in product(horizons, STARTS, SCALES)]


def jobs(args: argparse.Namespace) -> list[Job]:
    """The vanilla twin and every setting, seed by seed."""
    common = ["--data.name", args.data, "--data.root", str(args.root), "--model.depth", str(args.depth)]
    common += ["--trainer.max_epochs", str(args.epochs), "--trainer.devices", "1"]
    common += ["--data.label", args.label] if args.label else []
    common += ["--data.size", str(args.size)] if args.size else []
    out = []
    for seed in range(args.seeds):
        seeded = [*common, "--seed_everything", str(seed)]
        twin = ["--model.learn_tau", "false"]
        out.append(Job(f"{VANILLA}-{seed}", CONFIG, (*seeded, *twin, *args.more), args.epochs))
        # The extreme rates last, if the study does not come to its end.
        for setting in sorted(settings(args.depth), key=lambda s: abs(math.log10(s.scale))):
            out.append(Job(f"{setting.name}-{seed}", CONFIG, (*seeded, *setting.args, *args.more), args.epochs))
    return out


def outcome(setting: Setting, records: dict[str, dict[str, Any]], seeds: int) -> Outcome | None:
    """What the runs of ``setting`` say that are done, as those of their twins are; ``None`` if there is none yet."""
    done = [s for s in range(seeds) if {f"{setting.name}-{s}", f"{VANILLA}-{s}"} <= records.keys()]
    if not done:
        return None
    runs = [records[f"{setting.name}-{seed}"] for seed in done]
    errors = {seed: last_error(run) for seed, run in zip(done, runs, strict=True)}
    difference, half_width = paired(list(errors.values()), [last_error(records[f"{VANILLA}-{s}"]) for s in done])
    layers = [steps for run in runs for steps in run["steps"].values()]
    flat = [step for steps in layers for step in steps]
    spread = statistics.mean(statistics.pstdev(s) / max(statistics.mean(s), 1e-12) for s in layers)
    resorts = [int(run["resorts"]) for run in runs]
    return Outcome(setting, errors, difference, half_width, resorts, (min(flat), max(flat)), spread)


def last_error(record: dict[str, Any]) -> float:
    """Test error after the last epoch, in percent; chance level's worst, 100, for a run that came to no number."""
    error = record["epochs"][-1]["val_error"]
    return error if math.isfinite(error) else 100.0


def rendered(
    outcomes: list[Outcome], records: dict[str, dict[str, Any]], args: argparse.Namespace, command: str
) -> str:
    """The study on one page of Markdown."""
    twins = [last_error(records[name]) for s in range(args.seeds) if (name := f"{VANILLA}-{s}") in records]
    one, due = records[f"{VANILLA}-0"], args.seeds * (1 + len(settings(args.depth)))
    blocks = (args.depth - 2) // 6
    size = f", {args.size}x{args.size} pixels" if args.size else ""
    lines = [
        f"ResNet-{args.depth} (stages of {blocks}, {blocks - 1} and {blocks - 1} particles) on "
        f"{args.label or args.data}{size}, {args.epochs} epochs of the published protocol, {args.seeds} seeds. The "
        f"vanilla twin: {', '.join(f'{e:.2f}' for e in twins)} % (mean {statistics.mean(twins):.2f}).",
        "",
        "| horizon | start | learning rate of tau | test error, % | minus vanilla, paired, 95 % | re-sorts, by seed "
        "| final step sizes | their spread in a stage |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for o in outcomes:
        s = o.setting
        lines.append(
            f"| {s.horizon_told} | {s.start} | x{s.scale:g} | {statistics.mean(o.errors.values()):.2f} "
            f"| {told(o.difference, o.half_width)} | {', '.join(map(str, o.resorts))} "
            f"| {o.steps[0]:.2f} to {o.steps[1]:.2f} | {100 * o.spread:.0f} % |"
        )
    hours = sum(r["seconds"] for r in records.values()) / 3600
    return "\n".join(
        [
            *lines,
            "",
            *findings(outcomes),
            "",
            f"Made by `{command}`: {len(records)} of {due} runs, {hours:.1f} hours of training, precision "
            f"{one['trainer']['precision'] or 32}, on {one['device']}, {one['threads']} thread; torch "
            f"{one['versions']['torch']}, commit {', '.join(sorted({str(r['commit']) for r in records.values()}))}.",
            "",
        ]
    )


def findings(outcomes: list[Outcome]) -> list[str]:
    """What the table says, from its own figures."""
    best = min(outcomes, key=lambda o: o.difference)
    sure = [o for o in outcomes if math.isfinite(o.half_width)]
    better = [o for o in sure if o.difference + o.half_width < 0]
    worse = [o for o in sure if o.difference - o.half_width > 0]
    active = [o for o in outcomes if any(o.resorts)]
    said = [
        f"- {len(better)} of {len(sure)} settings with several seeds are better than the vanilla twin beyond their "
        f"interval, {len(worse)} worse; about {0.025 * len(sure):.1f} of each are expected by chance alone.",
        f"- Lowest mean: {_words(best)}, {told(best.difference, best.half_width)} points.",
        f"- Blocks change places in {len(active)} settings.",
    ]
    for axis, title in (("horizon", "horizon"), ("start", "start"), ("scale", "learning rate of tau")):
        usual, against = getattr(DEFAULT, axis), []
        for value in dict.fromkeys(getattr(o.setting, axis) for o in outcomes):
            if value == usual:
                continue
            ours, theirs = matched(outcomes, axis, value, usual)
            if ours:
                against.append(f"{_level(axis, value)} {told(*paired(ours, theirs))} ({len(ours)} pairs)")
        said.append(f"- {title.capitalize()} against {_level(axis, usual)}, all else equal: {', '.join(against)}.")
    return said


def matched(outcomes: list[Outcome], axis: str, value: Any, usual: Any) -> tuple[list[float], list[float]]:
    """Errors of the settings with ``value`` on one axis, and of those that differ from them by ``usual`` there."""
    of = {(o.setting, seed): error for o in outcomes for seed, error in o.errors.items()}
    pairs = [
        (error, of[other, seed])
        for (setting, seed), error in of.items()
        if getattr(setting, axis) == value and (other := replace(setting, **{axis: usual}), seed) in of
    ]
    return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]


def _level(axis: str, value: Any) -> str:
    return (
        f"x{value:g}" if axis == "scale" else "n" if value is None else str(value if axis == "start" else f"{value:g}")
    )


def _words(o: Outcome) -> str:
    return f"horizon {o.setting.horizon_told}, {o.setting.start} start, tau at x{o.setting.scale:g}"


def asked(argv: list[str]) -> argparse.Namespace:
    """The options.

    Raises:
        BadInput: A number out of its range.
    """
    parser = argparse.ArgumentParser(description="Horizon, start and learning rate of tau on real images.")
    parser.add_argument("--data", default="cifar10", help="digits, fashion-mnist, cifar10, cifar100, or folder:PATH")
    parser.add_argument("--label", help="how the page names the data set; its own name by default")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision keeps what it downloads")
    parser.add_argument("--size", type=int, help="side in pixels to which the images of a folder are resized")
    parser.add_argument("--depth", type=int, default=32, help="6k + 2 (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, help="runs at once (default: 3 on each GPU, or one on each core)")
    parser.add_argument("--out", type=Path, default=Path("runs/tau_study"))
    parser.add_argument("more", nargs="*", help="further options of every run, behind `--`")
    args = parser.parse_args(argv)
    for name in ("epochs", "seeds", "jobs", "size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name} {value}: pass at least 1")
    if args.depth < 14 or (args.depth - 2) % 6:
        raise BadInput(f"--depth {args.depth}: pass 6k + 2, at least 14, so that every stage has blocks to sort")
    return args


def document(command: str, outcomes: list[dict[str, Any]], runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What page and picture are made from: all of it is in the records of the runs, which lie beside."""
    one = next(iter(runs.values()))
    made = {key: one[key] for key in ("device", "threads", "versions")} | {"precision": one["trainer"]["precision"]}
    rows = [
        {
            "name": name,
            "seconds": run["seconds"],
            "commit": run["commit"],
            "error": [e["val_error"] for e in run["epochs"]],
        }
        for name, run in runs.items()
    ]
    return {"command": command, **made, "outcomes": outcomes, "runs": rows}


def write(args: argparse.Namespace, records: dict[str, dict[str, Any]], command: str) -> None:
    """tau_study.json, tau_study.md and tau_study.png in ``--out``, of the runs that are done."""
    found = [outcome(setting, records, args.seeds) for setting in settings(args.depth)]
    outcomes = [o for o in found if o is not None]
    if not outcomes:
        return
    plain = [{**asdict(o), "half_width": o.half_width if math.isfinite(o.half_width) else None} for o in outcomes]
    write_json(args.out / "tau_study.json", document(command, plain, records), DIGITS)
    (args.out / "tau_study.md").write_text(rendered(outcomes, records, args, command))
    seeds = f"{args.seeds} seed{'s' * (args.seeds > 1)}"
    title = f"ResNet-{args.depth} on {args.label or args.data}, {args.epochs} epochs, {seeds}"
    draw(args.out / "tau_study.png", outcomes, title)


def main() -> None:
    command = "python recipes/tau_study.py " + shlex.join(sys.argv[1:])
    with one_line_endings("tau_study.py"):
        args = asked(sys.argv[1:])
        open_source(args.data, args.root, args.size)  # a wrong --data is told before a process is started
        at_once = args.jobs or at_once_by_default()
        records = carry_out(jobs(args), args.out / "runs", at_once, finished=lambda done: write(args, done, command))
        write(args, records, command)
    print((args.out / "tau_study.md").read_text())
