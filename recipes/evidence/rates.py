#!/usr/bin/env python3
"""One learning rate for all depths? The best rate by depth, at T = n and at one T for all, and which ends lower.

    python recipes/evidence/rates.py --data folder:PATH/cifar10-jpeg --label cifar10-jpeg [--blocks 4 16 64]
        [--horizon 4] [--optimizers adam sgd] [--steps 500] [--seeds 1] [--long-blocks 16] [--long-steps 3000]
        [--long-seeds 11 12] [--kept runs/rates] [--out benchmarks/results] [--only-done]

Residual MLPs with a layer norm before each branch, fixed steps T / n, on images averaged to 8 x 8 pixels. At a T that
does not grow with n a block's gradient is T / n of what it is at T = n: in the blocks Adam's eps is multiplied by
T / n, SGD's rate by n / T. First every rate for a short run; then longer ones at the best rate of each side, half and
twice it. What is done stays in ``--kept``: the same command goes on where it stopped; with
``--only-done`` it makes nothing and tells what there is.
"""

from __future__ import annotations

import math
import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn

from recipes.errors import BadInput, leave
from recipes.evidence.finetune import load
from recipes.evidence.stacks import Classifier, pre_norm_branch
from recipes.evidence.tries import Row, carried_out, descend, document, drawn, made_by, options, prepared, written
from recipes.grids.paired import paired
from torch_meanfield import MeanFieldSequential

NAME = "depth_and_rate"
SIDE, WIDTH, BATCH = 8, 64, 64
RATES = {
    "adam": [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2],
    "sgd": [0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32],
}
EPS = 1e-8
LONG_RATES = (0.5, 1.0, 2.0)  # of long runs, over the best of the short ones


@dataclass(frozen=True)
class Job:
    """One training; ``horizon`` 0 stands for T = n."""

    blocks: int
    horizon: float
    optimizer: str
    rate: float
    steps: int
    seed: int

    @property
    def key(self) -> str:
        """A file name."""
        return f"{self.optimizer}-{self.blocks}-{self.horizon:g}-{self.rate:g}-{self.steps}-{self.seed}"

    @property
    def share(self) -> float:
        """The step of each block, T / n."""
        return self.horizon / self.blocks if self.horizon else 1.0


def optimizer_of(job: Job, model: Classifier) -> torch.optim.Optimizer:
    """Adam or SGD with momentum 0.9, scaled in the blocks to the size that their gradients have."""
    blocks = list(model.stack.parameters())
    ends = [*model.first.parameters(), *model.last.parameters()]
    if job.optimizer == "adam":
        return torch.optim.Adam([{"params": ends}, {"params": blocks, "eps": EPS * job.share}], lr=job.rate, eps=EPS)
    return torch.optim.SGD([{"params": ends}, {"params": blocks, "lr": job.rate / job.share}], job.rate, momentum=0.9)


def trained(job: Job, x: Tensor, y: Tensor) -> Row:
    """The training loss."""
    torch.manual_seed(job.seed)
    branches: list[nn.Module] = [pre_norm_branch(WIDTH) for _ in range(job.blocks)]
    stack = MeanFieldSequential(*branches, horizon=job.horizon or None, learn_tau=False)
    model = Classifier(stack, x[0].numel(), WIDTH, int(y.max()) + 1).to(x.device)
    return descend(model, optimizer_of(job, model), drawn(x, y, BATCH, job.steps, job.seed))


def sweep(args: Namespace) -> list[Job]:
    """Every rate at every depth."""
    return [
        Job(n, horizon, kind, rate, args.steps, seed)
        for kind in args.optimizers
        for n in args.blocks
        for horizon in (0.0, args.horizon)
        for rate in RATES[kind]
        for seed in args.seeds
    ]


def longer(rows: Sequence[Row], args: Namespace) -> list[Job]:
    """On fresh seeds, the best rate of each side in the sweep, half and twice it."""
    jobs = []
    for kind in args.optimizers:
        for n in args.long_blocks:
            for horizon in (0.0, args.horizon):
                means = by_rate(rows, kind, n, horizon, args.steps)
                if means:  # of an unfinished sweep that is only told there may be none
                    best = min(means, key=lambda rate: means[rate])
                    rates = [factor * best for factor in LONG_RATES]
                    jobs += [
                        Job(n, horizon, kind, rate, args.long_steps, seed) for rate in rates for seed in args.long_seeds
                    ]
    return jobs


def due(args: Namespace) -> int:
    """The number of runs of the whole grid."""
    each = len(args.long_blocks) * 2 * len(LONG_RATES) * len(args.long_seeds)
    return len(sweep(args)) + len(args.optimizers) * each


def by_rate(rows: Sequence[Row], optimizer: str, blocks: int, horizon: float, steps: int) -> dict[float, float]:
    """The mean loss at each rate; infinite if a run diverged."""
    of: dict[float, list[float]] = {}
    for r in rows:
        if (r["optimizer"], r["blocks"], r["horizon"], r["steps"]) == (optimizer, blocks, horizon, steps):
            of.setdefault(r["rate"], []).append(math.inf if r["loss"] is None else r["loss"])
    return {rate: statistics.mean(of[rate]) for rate in sorted(of)}


def _names(settings: Row) -> dict[float, str]:
    return {0.0: "T = n", settings["horizon"]: f"T = {settings['horizon']:g}"}


def sweep_table(rows: Sequence[Row], optimizer: str, settings: Row) -> str:
    """The loss of short runs by rate, the least of each row in bold."""
    rates = RATES[optimizer]
    lines = [
        f"| {optimizer}, {settings['steps']} steps | {' | '.join(f'{rate:g}' for rate in rates)} |",
        f"| --- |{' ---: |' * len(rates)}",
    ]
    for horizon, name in _names(settings).items():
        for n in settings["blocks"]:
            means = by_rate(rows, optimizer, n, horizon, settings["steps"])
            least = min(means.values(), default=math.inf)
            cells = [_told(means.get(rate), least) for rate in rates]
            lines.append(f"| {name}, {n} blocks | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _told(loss: float | None, least: float) -> str:
    if loss is None:
        return ""
    text = "diverged" if not math.isfinite(loss) else f"{loss:.3f}" if loss < 100 else f"{loss:.0e}"
    return f"**{text}**" if loss == least else text


def best_rates(rows: Sequence[Row], optimizer: str, settings: Row) -> list[str]:
    """How far the best rate moves with depth, in words."""
    said = []
    for horizon, name in _names(settings).items():
        best = {}
        for n in settings["blocks"]:
            means = by_rate(rows, optimizer, n, horizon, settings["steps"])
            if len(means) == len(RATES[optimizer]):
                best[n] = min(means, key=lambda rate: means[rate])
        if not best:
            continue
        ratio = max(best.values()) / min(best.values())
        told_by = ", ".join(f"{rate:g} at {n}" for n, rate in best.items())
        said.append(f"- {optimizer}, {name}: the best rate is {told_by} blocks; it moves by a factor of {ratio:g}.")
    return said


def long_table(rows: Sequence[Row], settings: Row) -> tuple[str, list[str]]:
    """Longer runs, each side at the best of its three rates; and which ends lower, in words."""
    steps, names = settings["long_steps"], _names(settings)
    lines = [
        f"| {steps} steps | rate | seeds | loss | minus T = n, paired, 95 % |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    said = []
    for kind in settings["optimizers"]:
        for n in settings["long_blocks"]:
            found = {horizon: best_of_long(rows, kind, n, horizon, settings) for horizon in names}
            chosen = {horizon: best for horizon, best in found.items() if best}
            for horizon, (rate, losses, place) in chosen.items():
                both = sorted(losses.keys() & chosen[0.0][1].keys()) if horizon and 0.0 in chosen else []
                difference = paired([losses[s] for s in both], [chosen[0.0][1][s] for s in both]) if both else None
                lines.append(
                    f"| {kind}, {n} blocks, {names[horizon]} | {rate:g}{place} | {len(losses)} "
                    f"| {statistics.mean(losses.values()):.3f} | {_apart(*difference) if difference else ''} |"
                )
                if difference:
                    sure = abs(difference[0]) > difference[1]
                    word = ("lower" if difference[0] < 0 else "higher") if sure else "neither lower nor higher"
                    said.append(f"- {kind}, {n} blocks, {steps} steps: {names[horizon]} ends {word} than T = n.")
            said += [
                f"- {kind}, {n} blocks, {steps} steps, {names[horizon]}: not finished."
                for horizon, best in found.items()
                if best is None
            ]
    return "\n".join(lines) + "\n", said


def _apart(mean: float, half_width: float) -> str:
    return f"{mean:+.3f}" + (f" ± {half_width:.3f}" if math.isfinite(half_width) else "")


def best_of_long(
    rows: Sequence[Row], optimizer: str, blocks: int, horizon: float, settings: Row
) -> tuple[float, dict[int, float], str] | None:
    """The best rate of long runs, its losses by seed, and whether it is the lowest or the highest tried.

    It is chosen over the seeds on which every rate has been run. ``None`` if a rate has no run yet, or all diverged.
    """
    keys = {"optimizer": optimizer, "blocks": blocks, "horizon": horizon, "steps": settings["long_steps"]}
    of: dict[float, dict[int, float]] = {}
    for r in rows:
        if all(r[k] == value for k, value in keys.items()) and r["seed"] in settings["long_seeds"]:
            of.setdefault(r["rate"], {})[r["seed"]] = math.inf if r["loss"] is None else r["loss"]
    if len(of) < len(LONG_RATES):
        return None
    seeds = sorted(set.intersection(*(set(losses) for losses in of.values())))
    means = {rate: statistics.mean(losses[s] for s in seeds) for rate, losses in of.items()} if seeds else {}
    best = min(means, key=lambda rate: means[rate], default=math.nan)
    if not math.isfinite(means.get(best, math.inf)):
        return None
    place = ", lowest tried" if best == min(of) else ", highest tried" if best == max(of) else ""
    return best, {s: of[best][s] for s in seeds}, place


def report(found: Row) -> str:
    """The whole text, from the JSON alone."""
    s, rows = found["settings"], found["rows"]
    parts = [
        f"Residual MLPs (layer norm, linear, GELU, linear; width {WIDTH}) with fixed steps T / n on {found['data']} at "
        f"{SIDE} x {SIDE} pixels, batch {BATCH}; cross entropy of the training batches, mean of the last tenth. Adam's "
        f"eps in the blocks times T / n; SGD (momentum 0.9): their rate times n / T. Seeds of the short runs "
        f"{', '.join(map(str, s['seeds']))}, of the long ones {', '.join(map(str, s['long_seeds']))}.\n"
    ]
    for kind in s["optimizers"]:
        parts += [sweep_table(rows, kind, s), "\n".join(best_rates(rows, kind, s)) + "\n"]
    table, said = long_table(rows, s)
    parts += [
        "Each side at the best of three rates (its best of the short runs, half and twice it), chosen on the seeds "
        "that are told:\n",
        table,
    ]
    return "\n".join([*parts, "\n".join(said) + "\n", made_by(found)])


def draw(path: Path, found: Row) -> None:
    """The loss of the short runs by rate: a panel for each optimizer and T, a line for each depth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    s = found["settings"]
    panels: list[tuple[str, Any]] = [(kind, horizon) for kind in s["optimizers"] for horizon in _names(s)]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.8 * len(panels), 3.6), squeeze=False, sharey=True)
    for axis, (kind, horizon) in zip(axes[0], panels, strict=True):
        for n in s["blocks"]:
            means = by_rate(found["rows"], kind, n, horizon, s["steps"])
            finite = {rate: loss for rate, loss in means.items() if math.isfinite(loss)}
            axis.plot(list(finite), list(finite.values()), "o-", label=f"{n} blocks")
        axis.set(title=f"{kind}, {_names(s)[horizon]}", xlabel="learning rate", xscale="log", ylim=(None, 2.4))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"training loss after {s['steps']} steps")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def arguments() -> Namespace:
    """The command line."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--horizon", type=float, default=4.0, help="the T that is the same at every depth")
    parser.add_argument("--optimizers", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--long-blocks", type=int, nargs="+", default=[16])
    parser.add_argument("--long-steps", type=int, default=3000)
    parser.add_argument("--long-seeds", type=int, nargs="+", default=[11, 12, 13])
    return options(parser, NAME)


def main() -> None:
    """The script."""
    args = arguments()
    torch.set_num_threads(1)  # the sums come out the same on every machine
    try:
        if not args.horizon > 0:
            raise BadInput(f"--horizon {args.horizon:g}: a time, so above 0")
        data, label = load(Namespace(data=args.data, root=args.root, label=args.label, out=args.kept))
    except BadInput as failure:
        leave("rates.py", failure)
    x, y = (t.to(args.device) for t in (prepared(data.train, SIDE), data.train.labels))

    def run(job: Job) -> Row:
        return trained(job, x, y)

    rows = carried_out(sweep(args), run, args.kept / "runs", "short runs", args.only_done, args.device)
    rows += carried_out(longer(rows, args), run, args.kept / "runs", "long runs", args.only_done, args.device)
    try:
        written(document(rows, due(args), "rates", args, label), NAME, report, draw, args.out)
    except BadInput as failure:
        leave("rates.py", failure)


if __name__ == "__main__":
    main()
