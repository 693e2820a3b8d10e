#!/usr/bin/env python3
"""Is it the times or the small steps? A ResNet from scratch at several horizons, its steps fixed and learned.

    python recipes/evidence/times.py --data folder:PATH/cifar10-jpeg --label cifar10-jpeg [--depth 20] [--side 16]
        [--images 6000] [--epochs 6] [--rates 0.05 0.2] [--tuning-seeds 1] [--seeds 11 12 13] [--arms vanilla ...]
        [--kept runs/times] [--out benchmarks/results] [--only-done]

First every arm at every rate on the tuning seeds, by the error on 3,000 of the test images; then at its best rate on
fresh seeds, by the error on the others, paired against `vanilla`. What is done stays in ``--kept``: the same command
goes on where it stopped; with ``--only-done`` it makes nothing and tells what there is.
"""

from __future__ import annotations

import math
import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.errors import BadInput, leave
from recipes.evidence.arms import WEIGHT_DECAY, Scaled
from recipes.evidence.finetune import load
from recipes.evidence.report import edges
from recipes.evidence.rows import errors_by_seed
from recipes.evidence.training import BATCH, batches, factor, some_of
from recipes.evidence.tries import Row, carried_out, document, made_by, options, written
from recipes.grids.paired import paired, told
from recipes.images.source import Images
from torch_meanfield import MeanFieldResNet, MeanFieldSequential, Motion, param_groups, subscribe

NAME = "times_or_steps"


@dataclass(frozen=True)
class Arm:
    """One side.

    Attributes:
        step: Of every block at the start, as a power of the number n of blocks of its stage: 0 for 1 (T = n), -0.5
            for T = sqrt n, -1 for T = 1.
        form: ``fixed`` or ``learned`` steps, or learned ``factors`` without order.
    """

    step: float = 0.0
    form: Literal["fixed", "learned", "factors"] = "fixed"
    begins: float = 1.0  # of the factors


ARMS = {
    "vanilla": Arm(),
    "T = sqrt n, fixed": Arm(-0.5),
    "T = 1, fixed": Arm(-1),
    "T = n, learned": Arm(0, "learned"),
    "T = sqrt n, learned": Arm(-0.5, "learned"),
    "T = 1, learned": Arm(-1, "learned"),
    "factors from 1": Arm(0, "factors"),
    "factors from 0 (SkipInit)": Arm(0, "factors", begins=0.0),
}


@dataclass(frozen=True)
class Job:
    """One training."""

    arm: str
    depth: int
    side: int
    images: int
    epochs: int
    rate: float
    seed: int
    on: Literal["tuning", "report"]

    @property
    def key(self) -> str:
        """A file name."""
        arm = self.arm.replace(", ", "-").replace(" ", "_")
        return f"{arm}-{self.depth}-{self.side}-{self.images}-{self.epochs}-{self.rate:g}-{self.on}-{self.seed}"


def network(arm: Arm, depth: int, classes: int) -> MeanFieldResNet:
    """A ResNet whose stages begin with the steps of ``arm``."""
    net = MeanFieldResNet(depth, classes, learn_tau=arm.form == "learned")
    for layer in stages(net):
        if arm.form == "factors":
            for branch in layer:
                inside: nn.Sequential = branch  # type: ignore[assignment]
                inside[-1] = Scaled(inside[-1])
                nn.init.constant_(inside[-1].factor, arm.begins)
        elif arm.step:
            layer.set_tau_(layer.tau.detach() * len(layer) ** arm.step)
    return net


def stages(net: nn.Module) -> list[MeanFieldSequential]:
    """The layers with times."""
    return [m for m in net.modules() if isinstance(m, MeanFieldSequential)]


def trained(job: Job, train: Images, test: Images, classes: int) -> Row:
    """SGD with momentum 0.9, weight decay 1e-4, half a cosine to 0, mirrored images; forward passes in bfloat16."""
    torch.manual_seed(job.seed)
    net = network(ARMS[job.arm], job.depth, classes).to(train.pixels.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(param_groups(net, job.rate, WEIGHT_DECAY), lr=job.rate, momentum=0.9)
    total = job.epochs * (job.images // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, total))
    some = some_of(train, job.images)
    moved: list[Motion] = []
    last: list[float] = []
    with subscribe(moved.append, net):
        for pixels, labels in batches(some, total, job.seed):
            with torch.autocast(pixels.device.type, torch.bfloat16):
                loss = F.cross_entropy(net(ready(pixels, job.side)), labels)
            if not math.isfinite(loss.item()):
                return {"error": None, "loss": None, "steps": [], "resorts": 0}
            last.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    steps = [s for layer in stages(net) for s in layer.steps().tolist()]
    if ARMS[job.arm].form == "factors":
        steps = [m.factor.item() for m in net.modules() if isinstance(m, Scaled)]
    tail = last[-max(1, len(last) // 10) :]
    resorts = sum(m.cause == "resort" for m in moved)
    return {"error": wrong(net, test, job.side), "loss": statistics.mean(tail), "steps": steps, "resorts": resorts}


def ready(pixels: Tensor, side: int) -> Tensor:
    """``uint8`` pixels averaged to ``side`` pixels, about standardised."""
    return F.adaptive_avg_pool2d(pixels.float() / 255 - 0.47, side).mul(4).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def wrong(net: nn.Module, images: Images, side: int) -> float:
    """Test error in percent."""
    net.eval()
    parts = (images.select(index) for index in torch.arange(len(images)).split(500))
    count = sum(int((net(ready(p.pixels, side)).argmax(1) != p.labels).sum()) for p in parts)
    return 100 * count / len(images)


def best_rates(rows: Sequence[Row]) -> dict[str, float]:
    """By arm the rate of the least mean error on the tuning seeds."""
    of: dict[str, dict[float, list[float]]] = {}
    for r in rows:
        if r["on"] == "tuning":
            of.setdefault(r["arm"], {}).setdefault(r["rate"], []).append(math.inf if r["error"] is None else r["error"])
    return {arm: min(rates, key=lambda rate: statistics.mean(rates[rate])) for arm, rates in of.items()}


def table(rows: Sequence[Row]) -> str:
    """The errors on fresh seeds, each arm at its rate, and its difference from vanilla."""
    rates, tuning = best_rates(rows), [r for r in rows if r["on"] == "tuning"]
    tried = sorted({r["rate"] for r in tuning})
    fresh = {arm: [r for r in rows if r["on"] == "report" and r["arm"] == arm] for arm in rates}
    seeds = sorted({r["seed"] for some in fresh.values() for r in some})
    lines = [
        f"| arm | {' | '.join(f'tuning, rate {rate:g}' for rate in tried)} | {' | '.join(f'seed {s}' for s in seeds)} "
        "| mean | minus vanilla, paired, 95 % | training loss | steps or factors at the end | re-sorts |",
        f"| --- |{' ---: |' * (len(tried) + len(seeds))} ---: | ---: | ---: | --- | ---: |",
    ]
    for arm, some in fresh.items():
        errors = errors_by_seed(some)
        cells = []
        for rate in tried:
            found = [r["error"] for r in tuning if (r["arm"], r["rate"]) == (arm, rate)]
            text = "" if not found else "diverged" if None in found else f"{statistics.mean(found):.2f}"
            cells.append(f"**{text}**" if text and rate == rates[arm] else text)
        cells += [f"{errors[s]:.2f}" if s in errors else "" for s in seeds]
        apart = _against(rows, arm)
        steps = [s for r in some for s in r["steps"]]
        cells += [
            f"{statistics.mean(errors.values()):.2f}" if errors else "",
            told(*apart) if apart else "",
            f"{statistics.mean(r['loss'] for r in some if r['loss'] is not None):.3f}" if errors else "",
            f"{min(steps):.2f} to {max(steps):.2f}" if steps else "",
            str(sum(r["resorts"] for r in some)),
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    if len({frozenset(errors_by_seed(some)) for some in fresh.values()}) > 1:
        lines += ["", "Means are over the seeds in the row; differences over those that both arms have."]
    return "\n".join(lines) + "\n"


def _against(rows: Sequence[Row], arm: str, other: str = "vanilla") -> tuple[float, float] | None:
    fresh = [r for r in rows if r["on"] == "report"]
    ours = errors_by_seed([r for r in fresh if r["arm"] == arm])
    theirs = errors_by_seed([r for r in fresh if r["arm"] == other])
    both = sorted(ours.keys() & theirs.keys())
    return paired([ours[s] for s in both], [theirs[s] for s in both]) if arm != other and both else None


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Three answers in words: short fixed steps, learned ones beside fixed ones, order beside factors."""
    pairs = [("T = 1, fixed", "vanilla"), ("T = sqrt n, fixed", "vanilla"), ("T = n, learned", "vanilla")]
    pairs += [(f"T = {t}, learned", f"T = {t}, fixed") for t in ("sqrt n", "1")]
    pairs += [("T = n, learned", "factors from 1"), ("T = 1, learned", "factors from 0 (SkipInit)")]
    said = []
    for arm, other in pairs:
        found = _against(rows, arm, other)
        if found is not None:
            word = "better than" if found[0] < 0 else "worse than"
            word = word if abs(found[0]) > found[1] else "not distinguishable from"
            said.append(f"- {arm}: {word} {other} ({told(*found)} points).")
    return said


def report(found: Row) -> str:
    """The whole text, from the JSON alone."""
    s = found["settings"]
    return (
        f"ResNet-{s['depth']} from scratch on {s['images']:,} images of {found['data']} at {s['side']} x {s['side']} "
        f"pixels, {s['epochs']} epochs (batch 128, SGD with momentum 0.9, weight decay 1e-4, half a cosine to 0, "
        f"mirrored images; forward passes of the training in bfloat16). n is the number of blocks of a stage. Test "
        f"error in %: rates by 3,000 test images (seed {', '.join(map(str, s['tuning_seeds']))}), the rest by the "
        f"others, each arm at its best rate.\n\n{table(found['rows'])}\n"
        + "\n".join([*edges(found["rows"]), ""])
        + "\n".join(verdicts(found["rows"]))
        + "\n\n"
        f"A short protocol with few seeds: it tells large effects alone.\n\n{made_by(found)}"
    )


def draw(path: Path, found: Row) -> None:
    """Each seed's error against that of vanilla, by arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fresh = [r for r in found["rows"] if r["on"] == "report"]
    base = errors_by_seed([r for r in fresh if r["arm"] == "vanilla"])
    arms = [arm for arm in dict.fromkeys(r["arm"] for r in fresh) if arm != "vanilla"]
    figure, axis = plt.subplots(figsize=(8, 4))
    for place, arm in enumerate(arms):
        errors = errors_by_seed([r for r in fresh if r["arm"] == arm])
        differences = [e - base[s] for s, e in errors.items() if s in base]
        axis.plot([place] * len(differences), differences, "o", color=f"C{place}", alpha=0.6)
        if differences:
            mean = statistics.mean(differences)
            axis.plot([place - 0.25, place + 0.25], [mean, mean], color=f"C{place}", linewidth=2.5)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(arms)), arms, rotation=20, ha="right", fontsize=8)
    axis.set_ylabel("test error minus vanilla, points")
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def arguments() -> Namespace:
    """The command line."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--side", type=int, default=16, help="pixels to which images are averaged")
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.2])
    parser.add_argument("--tuning-seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    return options(parser, NAME)


def main() -> None:
    """The script."""
    args = arguments()
    torch.set_num_threads(1)  # the sums come out the same on every machine
    try:
        data, label = load(Namespace(data=args.data, root=args.root, label=args.label, out=args.kept))
        if not BATCH <= args.images <= len(data.train):
            raise BadInput(f"--images {args.images}: {BATCH} (a batch) to {len(data.train)} (all)")
    except BadInput as failure:
        leave("times.py", failure)
    data = data.to(args.device)
    shape = (args.depth, args.side, args.images, args.epochs)

    def run(job: Job) -> Row:
        return trained(job, data.train, data.tuning if job.on == "tuning" else data.report, data.num_classes)

    tuning = [Job(a, *shape, rate, s, "tuning") for s in args.tuning_seeds for a in args.arms for rate in args.rates]
    rows = carried_out(tuning, run, args.kept / "runs", "tuning", args.only_done, args.device)
    rates = best_rates(rows)
    fresh = [Job(a, *shape, rates[a], s, "report") for s in args.seeds for a in args.arms if a in rates]
    rows += carried_out(fresh, run, args.kept / "runs", "fresh seeds", args.only_done, args.device)
    due = len(tuning) + len(args.seeds) * len(args.arms)
    try:
        written(document(rows, due, "times", args, label), NAME, report, draw, args.out)
    except BadInput as failure:
        leave("times.py", failure)


if __name__ == "__main__":
    main()
