#!/usr/bin/env python3
"""Mutation testing of the population, sorting and birth-death modules, by mutmut; `results/mutation.md` and `.json`.

    python tools/mutation.py [--workers 2] [--patience 5] [--survivors | --report] [MUTANT ...]

What is mutated, and which tests must notice, is in pyproject.toml under [tool.mutmut]. Mutants live in `mutants/`,
a copy of the checkout; a run that was stopped goes on where it stopped, and one after a change tests the changed
functions again. `--survivors` tries the tests of today on the mutants that lived, `--report` only writes the tables.
Ends with 1 below 85 % killed.

mutmut itself leaves out decorated functions, and with them most of what moves particles, which is decorated with
``torch.no_grad()``: those are mutated here. It mutates the wording of messages, which no test should pin: here it does
not touch what stands in a string inside ``raise`` or ``warnings.warn``, only that there is a message at all. It runs
the tests of a mutant in any order, all of them: here the fastest come first, up to `--patience` seconds in all, and
what tests import late is imported once.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import shlex
import sys
import time
from bisect import bisect
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import libcst as cst
from mutmut.__main__ import _run
from mutmut.mutation import file_mutation
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.runners.harness import PytestRunner
from mutmut.state import state
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import walk_mutatable_files
from mutmut.workers.isolation import ForkServerRunner

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WANTED = 85.0  # percent
DECORATORS = {"torch.no_grad()", "property", "with_own_hooks", "lru_cache(maxsize=64)"}
PRELOADED = ("accelerate", "lightning.pytorch", "torch._dynamo", "torch.distributed.checkpoint")
# A mutant that never ends, or ends the process, has been noticed as well.
KILLED = {"killed", "timeout", "segfault"}
UNKNOWN = {"no tests": "no test of the selection calls it", "not checked": "not tried"}


def source_of(node: cst.CSTNode) -> str:
    """``node`` as it is written."""
    return cst.Module([]).code_for_node(node)


def says_something(node: cst.CSTNode) -> bool:
    """Whether ``node`` is where a message is made: ``raise ...`` or ``warnings.warn(...)``."""
    return isinstance(node, cst.Raise) or (isinstance(node, cst.Call) and source_of(node.func) == "warnings.warn")


def preload() -> None:
    """Import what tests import late."""
    for name in PRELOADED:
        importlib.import_module(name)


def adapt(patience: float) -> None:
    """Teach mutmut the differences that the head of this file tells.

    Args:
        patience: Seconds that the tests of one mutant may take in all, by what they take without one.
    """
    visitor: Any = file_mutation.MutationVisitor
    skip, mutate = visitor._skip_node_and_children, visitor._should_mutate_node
    arrange = file_mutation.function_trampoline_arrangement
    submit, warm_up, stats = ForkServerRunner.submit, PytestRunner.warm_up, PytestRunner.run_stats

    def skip_node(self: Any, node: cst.CSTNode) -> bool:
        wording = self.__dict__.setdefault("wording", set())
        if says_something(node):
            wording.update(n for n in file_mutation._walk(node) if isinstance(n, cst.BaseString))
        if node in wording:
            return True
        if isinstance(node, cst.FunctionDef) and node.decorators:
            if {source_of(d.decorator) for d in node.decorators} <= DECORATORS:
                return False
        return bool(skip(self, node))

    def mutate_node(self: Any, node: cst.CSTNode) -> bool:
        # typing.cast returns its second argument, whatever the first is
        is_cast = isinstance(node, cst.Call) and source_of(node.func) == "cast"
        return not is_cast and bool(mutate(self, node))

    def bare_copies(function: cst.FunctionDef, mutants: Any, class_name: str | None) -> Any:
        empty, (trampoline, *copies), assignments, names = arrange(function, mutants, class_name)
        if {source_of(d.decorator) for d in function.decorators} <= DECORATORS:
            # The trampoline keeps the decorators. Around what it calls they would act a second time.
            copies = [copy.with_changes(decorators=[]) for copy in copies]
        return empty, [trampoline, *copies], assignments, names

    def fastest_first(self: Any, name: str, tests: list[str], *limits: Any) -> None:
        seconds = state().duration_by_test
        chosen = sorted(tests, key=lambda test: seconds[test])
        total = list(accumulate(seconds[test] for test in chosen))
        submit(self, name, chosen[: max(1, bisect(total, patience))], *limits)

    def timed(self: Any, **kwargs: Any) -> int:
        preload()  # or the first test that needs them would count as a slow one
        return stats(self, **kwargs)

    def warmer(self: Any) -> None:
        warm_up(self)
        preload()
        gc.collect()
        gc.freeze()  # pytest collects garbage before it ends, and all these modules would be gone through each time

    visitor._skip_node_and_children = skip_node
    visitor._should_mutate_node = mutate_node
    file_mutation.function_trampoline_arrangement = bare_copies
    ForkServerRunner.submit = fastest_first  # type: ignore[method-assign]
    PytestRunner.run_stats = timed  # type: ignore[method-assign]
    PytestRunner.warm_up = warmer  # type: ignore[method-assign]


def verdicts() -> dict[str, dict[str, str]]:
    """For each module, what became of each mutant."""
    out: dict[str, dict[str, str]] = {}
    for path in walk_mutatable_files():
        data = SourceFileMutationData(path=path)
        data.load()
        out[str(path)] = {name: status_by_exit_code[code] for name, code in data.exit_code_by_key.items()}
    return out


def survivor(module: str, name: str, status: str) -> dict[str, str]:
    """Where a mutant is, and what it changed."""
    lines = get_diff_for_mutant(name, path=module).splitlines()[3:]
    changed = {sign: " ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+"}
    function = name.rpartition(".")[2].partition("__mutmut_")[0].removeprefix("x_").removeprefix("xǁ")
    return {
        "module": module.removeprefix("torch_meanfield/"),
        "function": function.replace("ǁ", "."),
        "before": changed["-"],
        "after": changed["+"],
        "status": status,
    }


def where(entry: dict[str, str]) -> tuple[str, ...]:
    """What tells one survivor from another, also after the numbers of mutmut have changed."""
    return tuple(entry[key] for key in ("module", "function", "before", "after"))


def report(folder: Path, runs: list[str]) -> float:
    """Write both files; returns the percentage killed. Reasons given by hand in the JSON file are kept.

    Args:
        folder: Where to.
        runs: The commands so far, each with its time.
    """
    kept = folder / "mutation.json"
    old = json.loads(kept.read_text()) if kept.exists() else {}
    reasons = {where(entry): entry["why"] for entry in old.get("survivors", []) if entry.get("why")}
    found = verdicts()
    rows, survivors = [], []
    total: Counter[str] = Counter()
    for module, by_name in found.items():
        counts = Counter("killed" if status in KILLED else "survived" for status in by_name.values())
        total += counts
        rows.append({"module": module, "mutants": len(by_name), **{k: counts[k] for k in ("killed", "survived")}})
        for name, status in by_name.items():
            if status not in KILLED:
                entry = survivor(module, name, status)
                survivors.append({**entry, "why": reasons.get(where(entry), "")})
    # Not before: mutmut's own process must not hold torch while it forks.
    import torch

    from recipes.record import provenance, write_json

    about = {
        "tool": f"mutmut {version('mutmut')}",
        "runs": runs,
        **provenance(torch.device("cpu")),
    }
    written = {**about, "modules": rows, "survivors": survivors}
    write_json(kept, written)
    (folder / "mutation.md").write_text(page(about, rows, survivors))
    return percent(total["killed"], total.total())


def percent(killed: int, mutants: int) -> float:
    return 100 * killed / max(1, mutants)


def page(about: dict[str, Any], rows: list[dict[str, Any]], survivors: list[dict[str, str]]) -> str:
    """The results, to be read."""

    def line(name: str, mutants: int, killed: int) -> str:
        return f"| {name} | {mutants:,} | {killed:,} | {mutants - killed:,} | {percent(killed, mutants):.1f} |"

    def cell(text: str) -> str:
        return "`" + text.replace("|", "\\|").replace("`", "'") + "`"

    lines = [
        "# Mutants killed",
        "",
        "| module | mutants | killed | survived | % killed |",
        "| ---" + " | ---" * 4 + " |",
    ]
    lines += [line(f"`{r['module'].removeprefix('torch_meanfield/')}`", r["mutants"], r["killed"]) for r in rows]
    lines.append(line("all", sum(r["mutants"] for r in rows), sum(r["killed"] for r in rows)))
    lines += [
        "",
        f"By {about['tool']} on {about['device']}, torch {about['versions']['torch']}, commit {about['commit']}:",
        "",
        *(f"- {run}" for run in about["runs"]),
        "",
        "Killed: a test fails, the tests run for many times what they take, or the process dies. The wording of errors "
        "and warnings is not mutated (that there is one is), nor are calls of `len`, `isinstance` and `cast`, "
        "annotations and constants of modules. Only the fast tests listed under `[tool.mutmut]` in pyproject.toml "
        "are run.",
        "",
        "## Survivors",
    ]
    for module in dict.fromkeys(entry["module"] for entry in survivors):
        lines += ["", f"### `{module}`", "", "| in | was | became | why it lives |", "| --- | --- | --- | --- |"]
        for e in (e for e in survivors if e["module"] == module):
            cells = [
                f"`{e['function']}`",
                *(cell(e[key]) for key in ("before", "after")),
                e["why"] or UNKNOWN.get(e["status"], "not examined"),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mutants", nargs="*", metavar="MUTANT", help="names or patterns; all that were not tried yet")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--patience", type=float, default=5.0, help="seconds of tests for each mutant, fastest first")
    parser.add_argument("--survivors", action="store_true", help="those that lived, once more")
    parser.add_argument("--report", action="store_true", help="only write the tables")
    args = parser.parse_args(arguments)
    if Path.cwd() != ROOT:
        parser.error(f"mutmut reads pyproject.toml of the working directory; run this in {ROOT}")
    if str(ROOT) not in sys.path:  # run as a script
        sys.path.append(str(ROOT))
    os.environ["OMP_NUM_THREADS"] = "1"
    kept, begin = RESULTS / "mutation.json", time.perf_counter()
    runs: list[str] = []
    if kept.exists() and (args.report or Path("mutants").exists()):
        runs = json.loads(kept.read_text())["runs"]
    if not args.report:
        names = list(args.mutants)
        if args.survivors:
            names += [name for module in verdicts().values() for name, status in module.items() if status not in KILLED]
        adapt(args.patience)
        _run(names, args.workers)
        command = f"python tools/mutation.py {shlex.join(sys.argv[1:])}".strip()
        runs.append(f"`{command}`, {(time.perf_counter() - begin) / 60:.0f} minutes")
    score = report(RESULTS, runs)
    print(f"{score:.1f} % of the mutants were killed; see {RESULTS / 'mutation.md'}")
    return 0 if score >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
