#!/usr/bin/env python3
"""Deep and without norms: do short steps train what ordinary residual stacks cannot?

    python recipes/evidence/deep.py --data folder:PATH/cifar10-jpeg --label cifar10-jpeg [--blocks 64] [--width 256]
        [--steps 500] [--batch 100] [--rate 0.01] [--seeds 1 2] [--forms residual "horizon 1, learned"]
        [--kept runs/deep] [--out benchmarks/results] [--only-done]

Stacks of linear layers with ReLU between two linear layers, Adagrad, as in Bachlechner et al. (2021), "ReZero is all
you need", section 4; training loss. What is done stays in ``--kept``: the same command goes on where it stopped;
with ``--only-done`` it makes nothing and tells what there is.
"""

from __future__ import annotations

import math
import statistics
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from recipes.errors import BadInput, leave
from recipes.evidence.finetune import load
from recipes.evidence.stacks import FORMS, Classifier, relu_branch
from recipes.evidence.tries import (
    Row,
    carried_out,
    descend,
    document,
    drawn,
    made_by,
    options,
    prepared,
    written,
)
from torch_meanfield import Motion, subscribe

NAME = "deep_stacks"
SIDE = 32
PEER, OURS = "learned factors from 0 (ReZero)", "horizon 1, learned"
NEAR_0 = 0.1  # of the mean step: such a block does next to nothing


@dataclass(frozen=True)
class Job:
    """One training."""

    form: str
    blocks: int
    width: int
    steps: int
    batch: int
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """A file name."""
        form = self.form.replace(", ", "-").replace(" ", "_").replace("/", "_by_")
        return f"{form}-{self.blocks}-{self.width}-{self.steps}-{self.batch}-{self.rate:g}-{self.seed}"


def trained(job: Job, x: Tensor, y: Tensor) -> Row:
    """The loss, the factors or steps of the branches at the end, how many are near 0, and how often blocks moved."""
    torch.manual_seed(job.seed)
    branches = [relu_branch(job.width) for _ in range(job.blocks)]
    classes = int(y.max()) + 1
    model = Classifier(FORMS[job.form](branches, job.width), x[0].numel(), job.width, classes).to(x.device)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=job.rate)
    moved: list[Motion] = []
    with subscribe(moved.append, model):
        row = descend(model, optimizer, drawn(x, y, job.batch, job.steps, job.seed))
    steps = model.stack.steps().detach().abs().tolist()
    near = sum(s < NEAR_0 * statistics.mean(steps) for s in steps)
    resorts = sum(m.cause == "resort" for m in moved)
    return row | {"factors": [min(steps), max(steps)], "near_0": near, "resorts": resorts}


def table(found: Row) -> str:
    """The loss of each form, and what its steps became."""
    rows = found["rows"]
    seeds = sorted({r["seed"] for r in rows})
    lines = [
        f"| blocks | form | {' | '.join(f'seed {s}' for s in seeds)} | mean | steps or factors at the end | below a "
        "tenth of their mean | re-sorts |",
        f"| ---: | --- |{' ---: |' * len(seeds)} ---: | --- | ---: | ---: |",
    ]
    for blocks in sorted({r["blocks"] for r in rows}):
        means = _means(rows, blocks)
        for form, mean in means.items():
            some = [r for r in rows if (r["blocks"], r["form"]) == (blocks, form)]
            of = {r["seed"]: _told(r["loss"]) for r in some}
            shown = f"**{_told(mean)}**" if mean == min(means.values()) else _told(mean)
            least, most = min(r["factors"][0] for r in some), max(r["factors"][1] for r in some)
            learned = "learned" in form
            lines.append(
                f"| {blocks} | {form} | {' | '.join(of.get(s, '') for s in seeds)} "
                f"| {shown} | {least:.3g} to {most:.3g} "
                f"| {_range([r['near_0'] for r in some]) if learned else ''} "
                f"| {_range([r['resorts'] for r in some]) if 'horizon' in form else ''} |"
            )
    return "\n".join(lines) + "\n"


def _told(loss: float | None) -> str:
    if loss is None or not math.isfinite(loss):
        return "diverged"
    return f"{loss:.3f}" if loss < 100 else f"{loss:.0e}"


def _range(values: list[int]) -> str:
    return f"{min(values)}" if len({*values}) == 1 else f"{min(values)} to {max(values)}"


def _means(rows: list[Row], blocks: int) -> dict[str, float]:
    """The mean loss of each form; infinite if a run diverged."""
    of: dict[str, list[float]] = {}
    for r in rows:
        if r["blocks"] == blocks:
            of.setdefault(r["form"], []).append(math.inf if r["loss"] is None else r["loss"])
    return {form: statistics.mean(losses) for form, losses in of.items()}


def verdicts(found: Row) -> list[str]:
    """What the table says of one horizon beside learned factors, in words."""
    said = []
    for blocks in sorted({r["blocks"] for r in found["rows"]}):
        means = _means(found["rows"], blocks)
        best = min(means, key=lambda form: means[form])
        said.append(f"- {blocks} blocks: the lowest loss is that of {best} ({means[best]:.3f}).")
        if {PEER, OURS} <= means.keys():
            word = "lower than" if means[OURS] < means[PEER] else "not lower than"
            said.append(f"- {blocks} blocks: {OURS} ends {word} {PEER} ({means[OURS]:.3f} against {means[PEER]:.3f}).")
    return said


def report(found: Row) -> str:
    """The whole text, from the JSON alone."""
    s = found["settings"]
    return (
        f"Stacks of {' and '.join(map(str, s['blocks']))} blocks (linear, ReLU) of width {s['width']} on "
        f"{found['data']}, Adagrad at {s['rate']:g}, batch {s['batch']}, {s['steps']} steps; cross entropy of the "
        f"training batches, mean of the last tenth. Published, for ten epochs on CIFAR-10: without a stream 2.02, "
        f"residual 1.87, layer norm 2.02, ReZero 0.52; here fewer steps, one rate for all.\n\n"
        f"{table(found)}\n" + "\n".join(verdicts(found)) + f"\n\n{made_by(found)}"
    )


def draw(path: Path, found: Row) -> None:
    """The loss over the run, the mean over seeds: a panel for each depth, a line for each form."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = found["rows"]
    depths = sorted({r["blocks"] for r in rows})
    figure, axes = plt.subplots(1, len(depths), figsize=(6.4 * len(depths), 4.2), squeeze=False, sharey=True)
    for axis, blocks in zip(axes[0], depths, strict=True):
        for form in dict.fromkeys(r["form"] for r in rows):
            curves = [r["curve"] for r in rows if (r["blocks"], r["form"]) == (blocks, form) and r["curve"]]
            if curves:
                mean = [statistics.mean(at) for at in zip(*curves, strict=True)]
                at = [(i + 0.5) * found["settings"]["steps"] / len(mean) for i in range(len(mean))]
                axis.plot(at, mean, linewidth=2.4 if "horizon" in form else 1.2, label=form)
        axis.set(title=f"{blocks} blocks without norms", xlabel="step", ylim=(1.3, 2.6))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("training loss")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def arguments() -> Namespace:
    """The command line."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[64])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS), metavar="FORM")
    return options(parser, NAME)


def main() -> None:
    """The script."""
    args = arguments()
    torch.set_num_threads(1)  # the sums come out the same on every machine
    try:
        data, label = load(Namespace(data=args.data, root=args.root, label=args.label, out=args.kept))
    except BadInput as failure:
        leave("deep.py", failure)
    x, y = (t.to(args.device) for t in (prepared(data.train, SIDE), data.train.labels))
    jobs = [
        Job(form, blocks, args.width, args.steps, args.batch, args.rate, seed)
        for seed in args.seeds
        for blocks in args.blocks
        for form in args.forms
    ]
    rows = carried_out(jobs, lambda job: trained(job, x, y), args.kept / "runs", NAME, args.only_done, args.device)
    try:
        written(document(rows, len(jobs), "deep", args, label), NAME, report, draw, args.out)
    except BadInput as failure:
        leave("deep.py", failure)


if __name__ == "__main__":
    main()
