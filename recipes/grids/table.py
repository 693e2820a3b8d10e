"""The published table of Lu et al. 2020 as a command: vanilla and mean-field twins, over rows and seeds.

The command line is that of ``recipes/table.py``.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from recipes.errors import BadInput
from recipes.grids.grid import Job, at_once_by_default, carry_out, one_line_endings
from recipes.grids.paired import paired, told
from recipes.grids.rows import ROWS
from recipes.grids.table_picture import draw
from recipes.images.sources import open_source
from recipes.record import DIGITS, write_json

TWINS = {"vanilla": "false", "mean-field": "true"}  # --model.learn_tau
Records = dict[str, dict[str, Any]]


def run_name(row: str, twin: str, seed: int) -> str:
    """The name of a run's record."""
    return f"{row}-{twin}-{seed}"


@dataclass
class Table:
    """What is asked for: rows, seeds, and how far the published protocol is followed."""

    rows: list[str]
    seeds: int
    data: str | None
    label: str | None
    root: Path
    share: Fraction | None
    epochs: int | None
    published: bool
    more: list[str]

    def epochs_of(self, row: str) -> int:
        """Epochs of a row's runs."""
        if self.epochs is not None:
            return self.epochs
        return max(1, round(ROWS[row].epochs * (self.share or 1)))

    def label_of(self, row: str) -> str:
        """How the table names the data set of a row."""
        return self.label or open_source(self.data_of(row), self.root).name

    def data_of(self, row: str) -> str:
        """What ``--data`` is for a row."""
        return self.data or ROWS[row].data

    def jobs(self) -> list[Job]:
        """All runs; the seeds one after the other, so that an interrupted grid has whole seeds."""
        return [self._job(row, twin, seed) for seed in range(self.seeds) for row in self.rows for twin in TWINS]

    def _job(self, row: str, twin: str, seed: int) -> Job:
        epochs = self.epochs_of(row)
        args = ["--data.name", self.data_of(row), "--data.root", str(self.root), "--seed_everything", str(seed)]
        args += ["--data.label", self.label] if self.label else []
        args += ["--model.learn_tau", TWINS[twin], "--trainer.max_epochs", str(epochs), "--trainer.devices", "1"]
        return Job(run_name(row, twin, seed), ROWS[row].config, (*args, *self.more), epochs)

    def errors(self, row: str, records: Records) -> dict[str, dict[int, float]]:
        """Test error after the last epoch in percent, by twin and seed, of the runs that are done."""
        of: dict[str, dict[int, float]] = {twin: {} for twin in TWINS}
        for twin in TWINS:
            for seed in range(self.seeds):
                record = records.get(run_name(row, twin, seed))
                if record is not None:
                    of[twin][seed] = record["epochs"][-1]["val_error"]
        return of

    def comparable(self, row: str) -> bool:
        """Whether the published figures are of the data set that the row is trained on."""
        return self.data_of(row) == ROWS[row].data and self.label in (None, ROWS[row].data)


def differences(errors: dict[str, dict[int, float]]) -> tuple[list[float], list[float]]:
    """The errors of both twins on the seeds that both have finished: mean-field, vanilla."""
    both = sorted(errors["vanilla"].keys() & errors["mean-field"].keys())
    return [errors["mean-field"][s] for s in both], [errors["vanilla"][s] for s in both]


def _mean(values: list[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _heading(table: Table) -> str | None:
    """The heading of the published columns; ``None`` if they are not shown."""
    if all(table.comparable(row) for row in table.rows):
        full = all(table.epochs_of(row) == ROWS[row].epochs for row in table.rows)
        return "published" if full else "published, full schedule"
    return "published, on CIFAR: another data set" if table.published else None


def _remark(table: Table, heading: str | None) -> str:
    if heading == "published":
        return "The published figures are of this data set and schedule (Lu et al. 2020, Table 1)."
    if heading == "published, full schedule":
        return "The published figures are of this data set, but of 160 epochs (ResNeXt: 300); these runs are shorter."
    if heading is None:
        return "The published figures are of CIFAR-10 and CIFAR-100, not of this data set, and are left out."
    return "The published figures are of CIFAR-10 and CIFAR-100: these runs are not on those, so do not compare them."


def rendered(table: Table, records: Records, command: str) -> str:
    """The table in Markdown, with the remarks it needs."""
    heading = _heading(table)
    head = ["network", "data set", "epochs", "seeds", "vanilla", "mean-field", "difference, paired, 95 %", "re-sorts"]
    head += [f"{heading}: vanilla", "mean-field", "difference"] if heading else []
    lines = ["Test error in % after the last epoch, mean ± standard deviation over the seeds.", ""]
    lines += [f"| {' | '.join(head)} |", f"|{' --- |' * 2}{' ---: |' * (len(head) - 2)}"]
    for row in table.rows:
        of = table.errors(row, records)
        ours, theirs = differences(of)
        resorts = [
            records[name]["resorts"]
            for name in (run_name(row, "mean-field", seed) for seed in range(table.seeds))
            if name in records
        ]
        cells = [ROWS[row].title, table.label_of(row), str(table.epochs_of(row)), f"{len(ours)} of {table.seeds}"]
        cells += [_mean(list(of["vanilla"].values())), _mean(list(of["mean-field"].values()))]
        cells += [told(*paired(ours, theirs)) if ours else "–", ", ".join(map(str, resorts)) or "–"]
        if heading:
            vanilla, mean_field = ROWS[row].published
            cells += [f"{vanilla:.2f}", f"{mean_field:.2f}", f"{mean_field - vanilla:+.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", _remark(table, heading), *_made_by(table, records, command)]
    return "\n".join(lines) + "\n"


def _made_by(table: Table, records: Records, command: str) -> list[str]:
    if not records:
        return []
    one = next(iter(records.values()))
    devices = sorted({f"{r['device']}, {r['threads']} thread(s)" for r in records.values()})
    commits = sorted({str(r["commit"]) for r in records.values()})
    hours = sum(r["seconds"] for r in records.values()) / 3600
    precision, versions = one["trainer"]["precision"] or 32, one["versions"]
    return [
        "",
        f"Made by `{command}`: {len(records)} of {len(table.jobs())} runs, {hours:.1f} hours of training in all, "
        f"precision {precision}, on {'; '.join(devices)}; torch {versions['torch']}, lightning "
        f"{versions['lightning']}, commit {', '.join(commits)}.",
    ]


def write(table: Table, records: Records, out: Path, command: str) -> None:
    """table.json, table.md and table.png in ``out``."""
    rows: dict[str, Any] = {}
    for row in table.rows:
        errors = table.errors(row, records)
        ours, theirs = differences(errors)
        mean, half_width = paired(ours, theirs) if ours else (None, None)
        rows[row] = {
            "network": ROWS[row].title,
            "data": table.label_of(row),
            "epochs": table.epochs_of(row),
            "errors": errors,
            "difference": mean,
            # null where one pair, or none, leaves it unknown
            "half_width_95": half_width if len(ours) > 1 else None,
            "published": list(ROWS[row].published) if _heading(table) else None,
        }
    write_json(out / "table.json", {"command": command, "rows": rows}, DIGITS)
    (out / "table.md").write_text(rendered(table, records, command))
    curves = {
        f"{ROWS[row].title} on {table.label_of(row)}": {
            twin: [
                [epoch["val_error"] for epoch in records[name]["epochs"]]
                for name in (run_name(row, twin, seed) for seed in range(table.seeds))
                if name in records
            ]
            for twin in TWINS
        }
        for row in table.rows
    }
    shown = {rows[row]["network"]: rows[row] for row in table.rows if rows[row]["difference"] is not None}
    if shown:
        draw(out / "table.png", shown, curves)


def _share(text: str) -> Fraction:
    try:
        share = Fraction(text)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: pass a share of the published epochs, such as 1/16 or 0.0625")
    return share


def asked(argv: list[str]) -> tuple[Table, argparse.Namespace]:
    """The table that the command line asks for, and its other options.

    Raises:
        BadInput: A row that does not exist, or a number out of its range.
    """
    parser = argparse.ArgumentParser(
        description="Vanilla and mean-field twins over rows of the published table and seeds."
    )
    parser.add_argument("--rows", default="resnet20", help=f"comma-separated, or all: {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--data", help="digits, fashion-mnist, cifar10, cifar100, or folder:PATH; the row's own if left out"
    )
    parser.add_argument("--label", help="how the table names the data set; its own name by default")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision keeps what it downloads")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--schedule", type=_share, help="share of the published epochs, such as 1/16")
    length.add_argument("--epochs", type=int, help="epochs of every run; the shape of the schedule stays")
    parser.add_argument(
        "--jobs", type=int, help="runs at once (default: 3 on each GPU; without one, the cores over --threads)"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of the processor, for each run (default %(default)s)"
    )
    parser.add_argument(
        "--published", action="store_true", help="show the published figures beside another data set too"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/table"))
    parser.add_argument("more", nargs="*", help="further options of every run, behind `--`")
    args = parser.parse_args(argv)
    rows = list(ROWS) if args.rows == "all" else list(dict.fromkeys(args.rows.split(",")))
    unknown = [row for row in rows if row not in ROWS]
    if unknown:
        raise BadInput(f"--rows {','.join(unknown)}: unknown; accepted: {', '.join(ROWS)}, or all")
    for name in ("seeds", "epochs", "jobs", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name} {value}: pass at least 1")
    table = Table(
        rows, args.seeds, args.data, args.label, args.root, args.schedule, args.epochs, args.published, args.more
    )
    return table, args


def main() -> None:
    command = "python recipes/table.py " + shlex.join(sys.argv[1:])
    with one_line_endings("table.py"):
        table, args = asked(sys.argv[1:])
        for row in table.rows:
            table.label_of(row)  # opens the source: a wrong --data is told before a process is started
        at_once = args.jobs or max(1, at_once_by_default() // args.threads)
        records = carry_out(
            table.jobs(), args.out / "runs", at_once, args.threads, lambda done: write(table, done, args.out, command)
        )
        write(table, records, args.out, command)
    print((args.out / "table.md").read_text())
