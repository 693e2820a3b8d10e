#!/usr/bin/env python3
"""Which blocks of a public ResNet can go? Every criterion at every number removed, norms re-estimated, nothing trained.

    python recipes/evidence/criteria.py --weights PATH --data folder:PATH/cifar10-jpeg --label cifar10-jpeg
        [--network resnet56] [--removed 3 6 9 12] [--by greedy leave_one_out fisher cosine ratio random]
        [--draws 3] [--scored 512] [--images 2000] [--out benchmarks/results] [--kept runs/criteria]

Blocks are scored on training images with the statistics of the batch; the error is that on test images. `random` is
drawn several times. What is done stays in ``--kept``: the same command goes on where it stopped.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import nn
from tqdm import tqdm

from recipes.backbones.networks import NETWORKS, Network
from recipes.errors import BadInput, leave
from recipes.evidence.finetune import load
from recipes.evidence.training import BATCH, Data, error, some_of
from recipes.record import DIGITS, provenance, write_json
from torch_meanfield import convert
from torch_meanfield.pruning import depth_scores, prune_depth_

NAME = "prune_criteria"
CRITERIA = ("greedy", "leave_one_out", "fisher", "cosine", "ratio", "step")
Row = dict[str, Any]


def names_of(model: nn.Module) -> list[str]:
    """The blocks that can go, in the order of the model."""
    return [name for name, _ in depth_scores(model, by="step", progress=False)]


def order_by(by: str, draw: int, model: nn.Module, scoring: Sequence[Any]) -> tuple[list[str], float]:
    """The blocks in the order in which they go, and the seconds of processor time that this took."""
    begin = time.process_time()
    if by == "random":
        names = names_of(model)
        order = [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(draw))]
    else:
        order = list(depth_scores(model, scoring, by=by).order)  # type: ignore[arg-type]
    return order, time.process_time() - begin


def measured(by: str, draw: int, model: nn.Module, network: Network, data: Data, args: Namespace) -> Row:
    """The error of ``model`` without its first blocks in the order of ``by``, for each number removed."""
    train = some_of(data.train, args.scored)
    pairs = zip(train.pixels.split(BATCH), train.labels.split(BATCH), strict=True)
    scoring = [(network.prepared(pixels), labels) for pixels, labels in pairs]
    order, seconds = order_by(by, draw, model, scoring)
    errors = {}
    for count in args.removed:
        shorter = deepcopy(model)
        prune_depth_(shorter, remove=order[:count], batches=scoring)
        errors[count] = error(shorter, network, some_of(data.report, args.images))
    return {"by": by, "draw": draw, "order": order, "errors": errors, "seconds": seconds}


def table(document: Row) -> str:
    """Errors by number removed; of random draws the mean and the range."""
    removed = sorted(int(k) for k in document["rows"][0]["errors"])
    blocks = len(document["rows"][0]["order"])
    lines = [
        f"| criterion | {' | '.join(f'{k} of {blocks} removed' for k in removed)} | seconds of one core |",
        f"| --- |{' ---: |' * (len(removed) + 1)}",
    ]
    for by in dict.fromkeys(row["by"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["by"] == by]
        cells = []
        for count in removed:
            errors = [row["errors"][str(count)] for row in rows]
            spread = f" ({min(errors):.2f} to {max(errors):.2f})" if len(errors) > 1 else ""
            cells.append(f"{statistics.mean(errors):.2f}{spread}")
        lines.append(f"| {by} | {' | '.join(cells)} | {statistics.mean(r['seconds'] for r in rows):.0f} |")
    return "\n".join(lines) + "\n"


def report(document: Row) -> str:
    """The whole text, from the JSON alone."""
    return (
        f"{document['network']} on {document['data']}: test error in % on {document['images']:,} images, "
        f"{document['whole']:.2f} with all blocks; scored on {document['scored']} training images, norms re-estimated "
        f"on these, nothing trained:\n\n{table(document)}\nMade by `{document['command']}`: {document['device']}, "
        f"torch {document['versions']['torch']}, commit {document['commit']}.\n"
    )


def study(args: Namespace, data: Data, name: str) -> Row:
    """Make what is not there yet."""
    network = NETWORKS[args.network]
    model = convert(network.make(args.weights, data.num_classes), network.prepared(data.train.pixels[:2]))
    model.to(memory_format=torch.channels_last)
    test = some_of(data.report, args.images)
    sizes = f"{args.network}-{args.scored}-{len(test)}-{'-'.join(map(str, args.removed))}"
    rows = []
    jobs = [(by, draw) for by in args.by for draw in range(args.draws if by == "random" else 1)]
    for by, draw in tqdm(jobs, desc=NAME, unit="criterion"):
        path = args.kept / f"{sizes}-{by}-{draw}.json"
        if not path.is_file():
            write_json(path, measured(by, draw, model, network, data, args))
        rows.append(json.loads(path.read_text()))
    options = {"network": [args.network], "removed": args.removed, "by": args.by, "draws": [args.draws]}
    options |= {"scored": [args.scored], "images": [args.images]}
    words = [w for option, values in options.items() for w in (f"--{option}", *map(str, values))]
    places = ["--weights", "WEIGHTS", "--data", args.data.partition(":")[0] + ":DATA" * (":" in args.data)]
    return {
        "command": shlex.join(["python", "recipes/evidence/criteria.py", *places, "--label", name, *words]),
        "network": args.network,
        "data": name,
        "scored": args.scored,
        "images": len(test),
        "whole": error(model, network, test),
        **provenance(torch.device("cpu")),
        "rows": rows,
    }


def arguments() -> Namespace:
    """The command line."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="folder of the public weights")
    parser.add_argument("--data", required=True, help="cifar10, or folder:PATH")
    parser.add_argument("--label", help="how results name the data")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision keeps what it downloads")
    parser.add_argument("--network", default="resnet56", choices=list(NETWORKS))
    parser.add_argument("--removed", type=int, nargs="+", default=[3, 6, 9, 12])
    parser.add_argument("--by", nargs="+", default=[*CRITERIA[:-1], "random"], choices=[*CRITERIA, "random"])
    parser.add_argument("--draws", type=int, default=3, help="of random orders")
    parser.add_argument("--scored", type=int, default=512, help="training images that blocks are scored on")
    parser.add_argument("--images", type=int, default=2000, help="test images")
    parser.add_argument("--kept", type=Path, default=Path("runs/criteria"), help="folder of what is done")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def main() -> None:
    """The script."""
    args = arguments()
    torch.set_num_threads(1)  # the sums come out the same on every machine
    try:
        document = study(args, *load(Namespace(data=args.data, root=args.root, label=args.label, out=args.kept)))
    except ValueError as failure:  # more blocks than there are, beside what BadInput names
        leave("criteria.py", BadInput(str(failure)))
    write_json(args.out / f"{NAME}.json", document, DIGITS)
    text = report(json.loads((args.out / f"{NAME}.json").read_text()))
    (args.out / f"{NAME}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
