#!/usr/bin/env python3
"""The long part of the tests: every fault that a training must survive, many times, in one table.

    python tools/soak.py [--parts kills,overflows,...] [--tries 20] [--steps 100000] [--mutations 1000] [--seed 0]

Parts: `kills` (SIGKILL at random steps and moments, and inside the write of a checkpoint, `--tries` for each form of
training), `overflows` (of a GradScaler, at random steps, `--tries` runs for each optimizer), `ranks` (two and four
processes, DDP and FSDP2, against one; their checkpoints on other numbers of ranks; their kills), `long` (`--steps`
steps with an event in every fourth), `company` (threads, DataLoader workers, copies, other processes), `hostile`
(mutated checkpoints) and `properties` (hypothesis, at length). A part survived if the training ended in the very bits
of one to which nothing happened (ranks that share a batch: the motions of one process, tensors within 1e-9), or, for
hostile files, if each was loaded whole or refused by name. Ends with 1 if anything did not survive.
`results/soak.md` and `.json` are written anew after each part; parts that were not asked for are kept.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import random
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the checkout's packages are found beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.timing import table
from recipes.record import provenance, write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HEAD = ("fault", "tries", "survived", "how")


@dataclass
class Row:
    """One line of the table."""

    fault: str
    tries: int
    survived: int
    how: str


def say(text: str) -> None:
    """A line of progress."""
    print(f"\r  {text}".ljust(100), end="", file=sys.stderr, flush=True)


def kills(args: argparse.Namespace) -> Iterator[Row]:
    from tools.faults.kills import FORMS, PHASES, Death, killed_and_resumed, random_deaths, run

    steps, deaths_each = 80, 4
    for form in FORMS:
        with tempfile.TemporaryDirectory() as name:
            folder, begin = Path(name), time.perf_counter()
            run(form, folder / "whole", steps, Death())
            lasted = time.perf_counter() - begin
            survived = killed = tries = 0
            while killed < args.tries:
                seed, count = args.seed + tries, min(deaths_each, args.tries - killed)
                if tries % 2:  # at any moment, wherever it is
                    draw = random.Random(seed)
                    deaths = [Death(after=draw.uniform(0.2, 0.9) * lasted) for _ in range(count)]
                else:
                    deaths = random_deaths(seed, steps, count)
                outcome = killed_and_resumed(form, folder / str(tries), steps, deaths, folder / "whole")
                killed += outcome.kills
                survived += 0 if outcome.differences else outcome.kills
                tries += 1
                say(f"{form}: {killed} of {args.tries} kills, {survived} survived {outcome.differences[:1] or ''}")
            how = (
                f"runs of {steps} steps, {deaths_each} kills in each, end in the bits of the whole run; "
                f"at random moments, and at random steps ({', '.join(PHASES)})"
            )
            yield Row(f"SIGKILL, {form}", killed, survived, how)


def overflows(args: argparse.Namespace) -> Iterator[Row]:
    from tools.faults.overflows import OPTIMIZERS, overflow_and_compare

    for name, (inner, options) in OPTIMIZERS.items():
        skipped = unmoved = survived = 0
        for i in range(args.tries):
            ran, differing = overflow_and_compare(inner, {**options, "steep": bool(i % 2)}, 100, args.seed + i)
            skipped, unmoved = skipped + ran.skipped, unmoved + ran.skipped - len(ran.moved)
            survived += ran.skipped - len(ran.moved) if not differing else 0
            say(f"{name}: run {i + 1} of {args.tries}, {skipped} overflows {differing[:1] or ''}")
        how = f"{unmoved} moved nothing; {args.tries} runs of 100 steps ended as if those steps had never been"
        yield Row(f"overflow, {name}", skipped, survived, how)


def ranks(args: argparse.Namespace) -> Iterator[Row]:
    from tools.faults.ranks import FSDP_ON_CPU, Form, apart, distance, interrupted, resumed, together, trained

    steps, tolerance = 300, 1e-9
    strategies = ("DDP", "FSDP2") if FSDP_ON_CPU else ("DDP",)
    alone = trained(Form(), steps)
    causes = [cause for cause, _, _ in alone["motions"]]
    moved = f"{causes.count('resort')} re-sorts and {causes.count('birth_death')} motions of births"

    def row(fault: str, act: Callable[[], tuple[list[str], str]]) -> Row:
        say(f"ranks: {fault}")
        try:
            differing, how = act()
        except RuntimeError as error:  # a rank failed: that is a try that was not survived
            differing, how = [str(error)], "a rank failed"
        for difference in differing[:3]:
            print(f"\n{fault}: {difference}", file=sys.stderr)
        return Row(fault, 1, int(not differing), how)

    def against_alone(endings: list[dict[str, Any]]) -> tuple[list[str], str]:
        far = distance(endings[0], alone)
        differing = apart(endings) + [f"{far:.1e} from one process"] * (far > tolerance)
        return differing, f"ranks alike in all bits; every motion of one process, tensors within {far:.0e} of it"

    for strategy in strategies:
        for world in (2, 4):
            row_of = functools.partial(together, world, trained, Form(strategy), steps)
            made = row(f"{strategy}, {world} ranks", lambda act=row_of: against_alone(act()))
            yield replace(made, how=f"{steps} steps in float64, {moved}: {made.how}")
    if FSDP_ON_CPU:
        narrow = Form("FSDP2", narrow=True, dtype=torch.float32)
        whole_batch = replace(narrow, alike=True, births={"batch_size": 32, "steep": False})
        (one,) = together(1, trained, whole_batch, steps)
        for world in (2, 4):

            def rounded(world: int = world) -> tuple[list[str], str]:
                # four ranks with a quarter of the batch each take a minute and show nothing that two do not
                parts = apart(together(world, trained, narrow, steps)) if world == 2 else []
                whole = apart([one, *together(world, trained, whole_batch, steps)])
                how = "ranks alike in all bits; " if world == 2 else ""
                return parts + whole, f"{steps} steps: {how}given the whole batch each, in the bits of one rank"

            yield row(f"FSDP2 in bfloat16, {world} ranks", rounded)
    for strategy in strategies:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            together(2, interrupted, Form(strategy), steps // 2, folder)
            for world in (1, 4):
                row_of = functools.partial(together, world, resumed, Form(strategy), steps, folder)
                made = row(f"{strategy}, checkpoint of 2 ranks on {world}", lambda act=row_of: against_alone(act()))
                yield replace(made, how=f"saved at step {steps // 2} of {steps}: {made.how}")
    yield from _ranks_killed(args, strategies)


def _ranks_killed(args: argparse.Namespace, strategies: tuple[str, ...]) -> Iterator[Row]:
    from tools.faults.kills import KEPT, Death, random_deaths
    from tools.faults.ranks_killed import RANKS, killed_and_resumed, run

    epochs, steps, kills = 4, 32, 4
    for strategy in strategies:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            say(f"SIGKILL of all ranks, {strategy}")
            run(strategy, folder / "whole", epochs, Death())
            outcome = killed_and_resumed(
                strategy, folder / "killed", epochs, random_deaths(args.seed, steps - KEPT, kills), folder / "whole"
            )
            for difference in outcome.differences[:3]:
                print(f"\n{strategy}: {difference}", file=sys.stderr)
            survived = 0 if outcome.differences else outcome.kills
            how = f"each of {RANKS} ranks ends, after {steps} steps, in the bits of its whole run"
            yield Row(f"SIGKILL of all ranks, {strategy} in Lightning", outcome.kills, survived, how)


def long(args: argparse.Namespace) -> Iterator[Row]:
    from tools.faults.long_runs import long_run

    figures = long_run(args.steps, args.seed, progress=True)
    grown = figures.memory[1] / figures.memory[0] - 1 if figures.memory[0] else 0.0
    flat = figures.populations[0] == figures.populations[1] and figures.counted[0] == figures.counted[1]
    how = (
        f"{figures.motions:,} motions; populations {figures.populations[1]} and {sum(figures.counted[1].values())} "
        f"hooks and registrations as after a tenth; memory {grown:+.2%} ({figures.memory[1]:.0f} MiB); "
        f"{figures.milliseconds[0]:.2f} ms a step in the second tenth, {figures.milliseconds[1]:.2f} in the last"
    )
    yield Row(f"{figures.steps:,} steps", 1, int(flat and abs(grown) < 0.01), how)


def company(args: argparse.Namespace) -> Iterator[Row]:
    from tools.faults.company import as_a_copy, beside_workers, in_another_process, in_threads, made, train
    from tools.faults.digits import differences

    steps, tries = 100, max(1, args.tries // 4)
    alone = {seed: train(made(seed), seed, steps) for seed in range(4)}

    def copied(make: Callable[[int], Any]) -> list[str]:
        twin, original, (before, after) = make(steps)
        return differences(twin, original) + differences(before, after)

    faults: dict[str, Callable[[], list[str]]] = {
        "four models in four threads": lambda: differences(in_threads([0, 1, 2, 3], steps), alone),
        "DataLoader workers, forked": lambda: differences(beside_workers("fork", 2, steps), alone[0]),
        "DataLoader workers, spawned": lambda: differences(beside_workers("spawn", 2, steps), alone[0]),
        "copy.deepcopy in mid-run": lambda: copied(as_a_copy),
        "pickled to another process in mid-run": lambda: copied(in_another_process),
    }
    for fault, differing in faults.items():
        survived = 0
        for i in range(tries):
            survived += not differing()
            say(f"{fault}: {i + 1} of {tries}")
        yield Row(fault, tries, survived, f"{steps} steps, the bits of the run alone")


def hostile(args: argparse.Namespace) -> Iterator[Row]:
    from tools.faults.hostile_files import soak

    tries = survived = 0
    while tries < args.mutations:
        count, good, failures = soak(min(100, args.mutations - tries), seed=args.seed + tries)
        for failure in failures:
            print(f"\n{failure}", file=sys.stderr)
        tries, survived = tries + count, survived + good
        say(f"mutated checkpoints: {tries} of {args.mutations}")
    yield Row("mutated checkpoints", tries, survived, "each loaded whole, or refused by name with nothing changed")


def properties(args: argparse.Namespace) -> Iterator[Row]:
    say("properties by generation: pytest is at work")
    options = ["-q", "tests/properties", "--hypothesis-profile=soak"]
    done = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"\n{done.stdout}{done.stderr}", file=sys.stderr)
    words = done.stdout.strip().splitlines()[-1].strip("= ").replace(",", "").split()
    counts = {kind: int(n) for n, kind in zip(words, words[1:], strict=False) if n.isdigit() and not kind.isdigit()}
    passed = counts.get("passed", 0)
    tests = passed + counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    if not tests:
        raise RuntimeError(f"pytest ran no test of tests/properties:\n{done.stdout}{done.stderr}")
    yield Row("properties by generation", tests, passed, f"tests: `pytest {shlex.join(options)}`")


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "kills": kills,
    "overflows": overflows,
    "ranks": ranks,
    "long": long,
    "company": company,
    "hostile": hostile,
    "properties": properties,
}


def write(parts: dict[str, dict[str, Any]], folder: Path) -> str:
    """Write both files; returns the table."""
    rows = [Row(**row) for name in PARTS for row in parts.get(name, {}).get("rows", [])]
    text = table(HEAD, [(r.fault, f"{r.tries:,}", f"{r.survived:,}", r.how) for r in rows])
    runs = {(p["command"], p["device"], p["versions"]["torch"], p["commit"]) for p in parts.values()}
    lines = [f"- `{command}`: {device}, torch {version}, commit {commit}" for command, device, version, commit in runs]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "soak.md").write_text("# Faults survived\n\n" + text + "\n\nBy\n\n" + "\n".join(sorted(lines)) + "\n")
    write_json(folder / "soak.json", parts)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="names with commas between them")
    parser.add_argument("--tries", type=int, default=20, help="kills per form, runs per optimizer")
    parser.add_argument("--steps", type=int, default=100_000, help="steps of the long run")
    parser.add_argument("--mutations", type=int, default=1000, help="mutations of checkpoints, in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of soak.md and soak.json")
    args = parser.parse_args()
    asked = args.parts.split(",")
    unknown = [name for name in asked if name not in PARTS]
    if unknown:
        parser.error(f"--parts {unknown[0]}: there is no such part; pass some of {', '.join(PARTS)}")
    if args.tries < 1 or args.steps < 400:
        parser.error(f"--tries must be at least 1 and --steps at least 400, got {args.tries} and {args.steps}")
    if importlib.util.find_spec("lightning") is None:
        parser.error("the kills need lightning; install the extra [lightning]")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    about = provenance(torch.device("cpu"))  # before files of ours make the checkout another one
    kept = args.out / "soak.json"
    parts: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    command = "python tools/soak.py " + shlex.join(sys.argv[1:])
    fine = True
    text = ""
    for name in asked:
        begin, rows = time.perf_counter(), list[Row]()
        for row in PARTS[name](args):
            rows.append(row)
            fine &= row.survived == row.tries
            say("")
            print(f"\r{row.fault}: {row.survived:,} of {row.tries:,} survived; {row.how}", flush=True)
        seconds = round(time.perf_counter() - begin, 1)
        parts[name] = {**about, "command": command.strip(), "seconds": seconds, "rows": [asdict(row) for row in rows]}
        text = write(parts, args.out)
    print(f"\n{text}\n\nwritten to {args.out / 'soak.md'}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
