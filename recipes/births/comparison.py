"""What the experiments on birth and death share: methods over seeds, one table, one JSON, one picture."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from recipes.record import DIGITS, provenance, write_json

Curve = list[tuple[float, float]]  # (step or width, value)


@dataclass
class Run:
    """One training: which setting and method, which seed, the curve of its error, and the last value of it."""

    setting: str
    method: str
    seed: int
    final: float
    seconds: float
    curve: Curve = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


def timed(setting: str, method: str, seed: int, train: Callable[[], tuple[Curve, dict[str, Any]]]) -> Run:
    """Run ``train`` and keep what it says; prints one line when it is done."""
    begin = time.perf_counter()
    curve, extra = train()
    run = Run(setting, method, seed, curve[-1][1], time.perf_counter() - begin, curve, extra)
    print(f"{setting:24s} {method:24s} seed {seed}: {run.final:.3e}  {extra or ''}  {run.seconds:.0f} s", flush=True)
    return run


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive numbers."""
    return math.exp(sum(math.log(v) for v in values) / len(values))


def table(runs: Sequence[Run], baseline: str, unit: str) -> str:
    """A markdown table: one row for each setting and method, seeds side by side, the ratio to ``baseline``."""
    seeds = sorted({r.seed for r in runs})
    lines = [
        f"| setting | method | {' | '.join(f'seed {s}' for s in seeds)} "
        f"| geometric mean | ratio to {baseline} | worst |",
        f"| --- | --- |{' --- |' * (len(seeds) + 3)}",
    ]
    for setting in dict.fromkeys(r.setting for r in runs):
        of = {(r.method, r.seed): r.final for r in runs if r.setting == setting}
        for method in dict.fromkeys(r.method for r in runs if r.setting == setting):
            values = [of[method, s] for s in seeds]
            ratios = [of[method, s] / of[baseline, s] for s in seeds]
            cells = " | ".join(f"{v:.2e}" for v in values)
            lines.append(
                f"| {setting} | {method} | {cells} | {geometric_mean(values):.2e} | {geometric_mean(ratios):.3f} | "
                f"{max(ratios):.3f} |"
            )
    return f"Final {unit}.\n\n" + "\n".join(lines) + "\n"


def save(out: Path, name: str, text: str, runs: Sequence[Run], settings: dict[str, Any]) -> None:
    """Write ``name``.md and ``name``.json to ``out``: the table, how it was made, and every curve."""
    out.mkdir(parents=True, exist_ok=True)
    command = "python " + shlex.join(sys.argv)
    made = provenance(torch.device("cpu"))
    made_of = {"command": command, "settings": settings, **made, "runs": [asdict(r) for r in runs]}
    write_json(out / f"{name}.json", made_of, DIGITS)
    seconds = sum(r.seconds for r in runs)
    foot = f"\nMade by `{command}` in {seconds / 60:.0f} minutes of training on {made['device']}.\n"
    (out / f"{name}.md").write_text(text + foot)
    print(text)


def draw(out: Path, name: str, runs: Sequence[Run], xlabel: str, ylabel: str, logx: bool = False) -> None:
    """One panel for each setting: a thin line for each seed, a thick one for their geometric mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    settings = list(dict.fromkeys(r.setting for r in runs))
    figure, axes = plt.subplots(1, len(settings), figsize=(5.2 * len(settings), 4), squeeze=False, sharey=True)
    for axis, setting in zip(axes[0], settings, strict=True):
        colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
        for colour, method in zip(colours, _methods(runs, setting), strict=False):
            curves = [r.curve for r in runs if (r.setting, r.method) == (setting, method)]
            for curve in curves:
                axis.plot(*zip(*curve, strict=True), color=colour, linewidth=0.6, alpha=0.5)
            mean = [(at[0][0], geometric_mean([max(v, 1e-12) for _, v in at])) for at in zip(*curves, strict=True)]
            axis.plot(*zip(*mean, strict=True), color=colour, linewidth=2, label=method)
        axis.set(title=setting, xlabel=xlabel, yscale="log", xscale="log" if logx else "linear")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0][0].set_ylabel(ylabel)
    figure.tight_layout()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / f"{name}.png", dpi=110)
    plt.close(figure)


def _methods(runs: Sequence[Run], setting: str) -> list[str]:
    return list(dict.fromkeys(r.method for r in runs if r.setting == setting))


def arguments(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options all experiments have."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs") / name, help="folder for the table, the JSON and the picture"
    )
    return parser
