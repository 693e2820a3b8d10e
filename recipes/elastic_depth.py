#!/usr/bin/env python3
"""Train once at a short horizon with learned times, then choose the depth: error against blocks kept.

    python recipes/elastic_depth.py --data fashion-mnist [--root data] [--blocks 16] [--kept 4 6 8 10 12 14]
        [--ways "T = 4, learned" "T = 4, fixed"] [--criteria step leave_one_out] [--seeds 1 2 3]
        [--images 12000] [--epochs 8] [--channels 16] [--side 16] [--out runs/elastic]

Blocks go by the criterion, norms are re-estimated on 512 training images, and nothing is trained after. Beside it
stand vanilla networks trained from scratch at each depth. What is done stays: the same command goes on where it
stopped, and renews elastic_depth.json, .md and .png after each run.
"""

from __future__ import annotations

import json
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from tqdm import tqdm

from recipes.elastic.network import WAYS, Network
from recipes.elastic.report import SCRATCH, draw, table
from recipes.elastic.training import Data, Job, Run, elastic
from recipes.errors import BadInput, leave
from recipes.evidence.training import some_of
from recipes.images.source import Images
from recipes.images.sources import open_source
from recipes.pruning.story import latencies
from recipes.record import DIGITS, provenance, write_json

CRITERIA = ("step", "greedy", "leave_one_out", "fisher", "cosine", "ratio")


def jobs(args: Namespace) -> Iterator[Job]:
    """Every way at the whole depth, then vanilla networks at each depth, seed by seed."""
    for seed in args.seeds:
        more = (seed, args.channels, args.epochs, args.rate)
        yield from (Job(way, args.blocks, *more) for way in args.ways)
        depths = {*args.kept, *(() if SCRATCH in args.ways else (args.blocks,))}
        yield from (Job(SCRATCH, depth, *more) for depth in sorted(depths, reverse=True))


def carried_out(job: Job, data: Data, args: Namespace) -> dict[str, Any]:
    """The run of ``job`` as plain data, made if it is not there."""
    path = args.out / "runs" / f"{job.key}.json"
    if not path.is_file():
        # A network from scratch is wanted whole; of the others every depth.
        kept = args.kept if job.blocks == args.blocks and job.way in args.ways else []
        write_json(path, _flat(elastic(job, data, kept, _criteria(job, args))))
    found: dict[str, Any] = json.loads(path.read_text())
    wanted = {str(job.blocks), *map(str, args.kept)}  # an earlier command may have asked for more depths
    found["errors"] = {by: {k: e for k, e in errors.items() if k in wanted} for by, errors in found["errors"].items()}
    return found


def _criteria(job: Job, args: Namespace) -> list[str]:
    learned = WAYS[job.way].learn
    return [by for by in args.criteria if learned or by != "step"] or ["leave_one_out"]


def _flat(run: Run) -> dict[str, Any]:
    whole = asdict(run)
    return {**whole.pop("job"), **whole}


def milliseconds(args: Namespace, data: Data) -> dict[int, float]:
    """Of a forward pass of vanilla networks of each depth, on 128 images."""
    depths = sorted({*args.kept, args.blocks})
    x = data.ready(data.test.pixels[:128])
    nets = [Network(x.shape[1], data.num_classes, k, args.channels, WAYS[SCRATCH]).eval() for k in depths]
    return dict(zip(depths, latencies(nets, x), strict=True))


def load(args: Namespace) -> tuple[Data, str]:
    """Images at ``--side`` pixels; ``--images`` of the training images, always the same ones."""
    source = open_source(args.data, args.root, args.side if args.data.startswith("folder:") else None)
    source.download()
    parts = []
    for images in (some_of(source.decode("train"), args.images), some_of(source.decode("test"), args.test_images)):
        pixels = images.pixels.float()
        small = F.interpolate(pixels, (args.side, args.side), mode="bilinear", antialias=True, align_corners=False)
        parts.append(Images(small.round().clamp(0, 255).to(torch.uint8), images.labels))
    return Data(*parts, source.num_classes, source.mirror), args.label or source.name


def study(args: Namespace, data: Data, name: str) -> None:
    """Make what is not there yet; table, picture and JSON are renewed after each run."""
    options = {"ways": args.ways, "criteria": args.criteria, "kept": args.kept, "seeds": args.seeds}
    options |= {k: [getattr(args, k)] for k in ("blocks", "images", "test_images", "epochs", "channels", "side")}
    words = [w for k, values in options.items() for w in (f"--{k.replace('_', '-')}", *map(str, values))]
    made = {
        "command": shlex.join(["python", "recipes/elastic_depth.py", "--data", name, *words]),
        "data": name,
        "blocks": args.blocks,
        "milliseconds": milliseconds(args, data),
        **provenance(torch.device("cpu")),
    }
    runs = []
    for job in tqdm(list(jobs(args)), desc="elastic depth", unit="run"):
        runs.append(carried_out(job, data, args))
        write_json(args.out / "elastic_depth.json", {**made, "runs": runs}, DIGITS)
    document = json.loads((args.out / "elastic_depth.json").read_text())
    text = table(document["runs"], args.blocks)
    hours = sum(r["seconds"] for r in runs) / 3600
    print(text)
    (args.out / "elastic_depth.md").write_text(
        f"Test error in % on {name}, {args.side} pixels, {args.images} training images, {args.epochs} epochs; nothing "
        f"is trained after a removal:\n\n{text}\nMade by `{made['command']}` in {hours:.2f} hours of one thread.\n"
    )
    draw(args.out / "elastic_depth.png", document)


def arguments() -> Namespace:
    """The command line."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="fashion-mnist", help="digits, fashion-mnist, cifar10, or folder:PATH")
    parser.add_argument("--label", help="how results name the data")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision keeps what it downloads")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--kept", type=int, nargs="+", default=[4, 6, 8, 10, 12, 14])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    parser.add_argument("--criteria", nargs="+", default=["step", "leave_one_out"], choices=CRITERIA)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--images", type=int, default=12_000, help="training images")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=Path("runs/elastic"))
    args = parser.parse_args()
    if args.blocks < 3 or not all(1 <= k < args.blocks for k in args.kept):
        parser.error(f"--kept {args.kept}: numbers from 1 to below --blocks {args.blocks}, which is at least 3")
    return args


def main() -> None:
    """The script."""
    args = arguments()
    torch.set_num_threads(1)  # the sums come out the same on every machine
    try:
        study(args, *load(args))
    except BadInput as error:
        leave("elastic_depth.py", error)


if __name__ == "__main__":
    main()
