#!/usr/bin/env python3
"""What a cut network is worth after fine-tuning: blocks by each criterion, channels at the same latency, a sibling.

    python recipes/evidence/cuts.py --weights PATH --data folder:PATH/cifar10-jpeg --label cifar10-jpeg
        [--network resnet56] [--sibling resnet32] [--removed 12] [--arms greedy cosine random channels sibling]
        [--adapt 400] [--adapt-rate 0.01] [--steps 300] [--rates 0.01 0.03] [--precision bf16]
        [--tuning-seeds 1] [--seeds 11 12 13] [--scored 512] [--out benchmarks/results] [--kept runs/cuts]

The network is adapted to the images once, and its blocks are scored. Every arm cuts a copy and fine-tunes it by the
same steps, first at every rate on the tuning seeds (3,000 of the test images choose), then at its best rate on fresh
seeds (the other test images report). `channels` is torch-pruning, cut to the latency of `greedy`; `sibling` a smaller
public network that was adapted alike. What is done stays in ``--kept``: the same command goes on where it stopped,
and renews cuts_NETWORK.json, .md and .png after each run.
"""

from __future__ import annotations

import itertools
import json
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from tqdm import tqdm

from recipes.backbones.networks import NETWORKS
from recipes.cuts.report import draw, report
from recipes.cuts.training import ARMS, Job, Setting, Workshop
from recipes.errors import BadInput, leave
from recipes.evidence.finetune import load
from recipes.evidence.rows import best_rate
from recipes.record import DIGITS, provenance, write_json

UNCUT = ("sibling", "whole")  # arms that are the same whatever is removed


def parts(args: Namespace) -> list[tuple[int, str]]:
    """The numbers of blocks removed with each arm; arms that lose none stand once, with 0."""
    cut = [(count, arm) for count in args.removed for arm in args.arms if arm not in UNCUT]
    return cut + [(0, arm) for arm in args.arms if arm in UNCUT]


def walk(args: Namespace, shop: Workshop) -> Iterator[Job]:
    """The jobs in their order: tuning part by part, then fresh seeds, all parts of each."""
    rates = {}
    for count, arm in parts(args):
        jobs = [
            Job(arm, count, rate, args.steps, seed, "tuning")
            for seed, rate in itertools.product(args.tuning_seeds, args.rates)
        ]
        yield from jobs
        rates[count, arm] = best_rate([(job.rate, shop.run(job)["error"]) for job in jobs], arm)
    for seed, (count, arm) in itertools.product(args.seeds, parts(args)):
        yield Job(arm, count, rates[count, arm], args.steps, seed)


def made(args: Namespace, name: str) -> dict[str, Any]:
    """What the runs have in common, for the result file."""
    several = ("removed", "arms", "rates", "tuning_seeds", "seeds")
    options: dict[str, list[Any]] = {key: getattr(args, key) for key in several}
    for key in ("network", "sibling", "adapt", "adapt_rate", "steps", "precision", "scored"):
        options |= {key: [getattr(args, key)]} if getattr(args, key) is not None else {}
    words = [w for key, values in options.items() for w in (f"--{key.replace('_', '-')}", *map(str, values))]
    places = ["--weights", "WEIGHTS", "--data", args.data.partition(":")[0] + ":DATA" * (":" in args.data)]
    return {
        "command": shlex.join(["python", "recipes/evidence/cuts.py", *places, "--label", name, *words]),
        "data": name,
        **provenance(torch.device("cpu")),
    }


def study(args: Namespace, shop: Workshop, common: dict[str, Any]) -> None:
    """Make what is not there yet; JSON, text and picture are renewed after each run."""
    runs = []
    fixed = {
        **common,
        "setting": asdict(shop.setting),
        "tuning_images": len(shop.data.tuning),
        "test_images": len(shop.data.report),
        "whole": shop.whole_errors(),
    }
    total = len(parts(args)) * (len(args.rates) * len(args.tuning_seeds) + len(args.seeds))
    with tqdm(total=total, desc=f"cuts of {args.network}", unit="run") as bar:
        for job in walk(args, shop):
            bar.set_postfix_str(job.key)
            new = not shop.done(job)
            runs.append(shop.run(job))
            bar.update()
            if new or len(runs) == total:
                cut = [count for count, arm in parts(args) if arm == "channels" and any(r["arm"] == arm for r in runs)]
                write(args, {**fixed, "channels": {count: shop.candidates(count) for count in cut}, "runs": runs})


def write(args: Namespace, document: dict[str, Any]) -> None:
    """The three files of the results."""
    base = args.out / f"cuts_{args.network}"
    write_json(base.with_suffix(".json"), document, DIGITS)
    stored = json.loads(base.with_suffix(".json").read_text())
    base.with_suffix(".md").write_text(report(stored))
    draw(base.with_suffix(".png"), stored)


def arguments() -> Namespace:
    """The command line."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="folder of the public weights")
    parser.add_argument("--data", required=True, help="cifar10, or folder:PATH")
    parser.add_argument("--label", help="how results name the data")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision keeps what it downloads")
    parser.add_argument("--network", default="resnet56", choices=list(NETWORKS))
    parser.add_argument("--sibling", choices=list(NETWORKS), help="a smaller network, for the arm of that name")
    parser.add_argument("--removed", type=int, nargs="+", default=[12], help="numbers of blocks")
    parser.add_argument("--arms", nargs="+", default=["greedy", "cosine", "random", "channels"], choices=ARMS)
    parser.add_argument("--adapt", type=int, default=400, help="steps of the whole network before it is cut")
    parser.add_argument("--adapt-rate", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=300, help="steps of each cut network")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.03])
    parser.add_argument("--precision", default="bf16", choices=["32", "bf16"], help="of the forward pass in training")
    parser.add_argument("--scored", type=int, default=512, help="training images that blocks are scored on")
    parser.add_argument("--tuning-seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--kept", type=Path, default=Path("runs/cuts"), help="folder of what is done")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if set(args.seeds) & set(args.tuning_seeds):
        parser.error(f"--seeds {args.seeds} and --tuning-seeds {args.tuning_seeds} must differ")
    if ("sibling" in args.arms) != (args.sibling is not None):
        parser.error("--arms sibling and --sibling NETWORK go together")
    return args


def main() -> None:
    """The script."""
    args = arguments()
    torch.set_num_threads(1)  # the sums come out the same on every machine
    try:
        data, name = load(Namespace(data=args.data, root=args.root, label=args.label, out=args.kept))
        setting = Setting(args.network, args.sibling, args.adapt, args.adapt_rate, args.scored, args.precision)
        study(args, Workshop(setting, data, args.weights, args.kept), made(args, name))
    except ValueError as failure:  # more blocks than there are, beside what BadInput names
        leave("cuts.py", BadInput(str(failure)))


if __name__ == "__main__":
    main()
