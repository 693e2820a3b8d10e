#!/usr/bin/env python3
"""Do learned steps let a pretrained network take a higher rate? Fine-tuning, arm against arm, rates tuned for each.

    python recipes/evidence/finetune.py --weights PATH --data folder:PATH/cifar10-jpeg --label cifar10-jpeg
        [--networks resnet20 efficientnet_lite0] [--arms plain converted "scale, no order"]
        [--rates 0.01 0.03 0.1] [--bracket] [--steps 100 400]
        [--precision bf16] [--device cuda] [--tuning-seeds 1] [--seeds 11 12 13 14 15] [--out runs/evidence]

First every arm is trained at every rate on the tuning seeds, and its rate chosen by the error on 3,000 of the test
images. Then it is trained at that rate on fresh seeds; what is reported is the error on the other test images, paired
by seed against `plain`. PATH of the weights holds the public files of recipes/backbones. What is done stays: the same
command goes on where it stopped, and renews finetune.json. Tables and pictures: recipes/evidence/report.py.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from tqdm import tqdm

from recipes.backbones.networks import NETWORKS
from recipes.errors import BadInput, leave
from recipes.evidence.arms import ARMS
from recipes.evidence.rows import best_rate
from recipes.evidence.training import Data, Job, Run, fine_tune, some_of
from recipes.images.source import Images
from recipes.images.sources import open_source
from recipes.record import DIGITS, known_device, provenance, write_json

TUNING = 3000  # test images by which rates are chosen; the others are reported


class Grid:
    """The jobs of a command: a file for each that is done.

    Args:
        folder: Where they lie.
        data: Images of all jobs.
        weights: Folder of the public weights.
    """

    def __init__(self, folder: Path, data: Data, weights: Path) -> None:
        self.folder, self._data, self._weights = folder, data, weights

    def done(self, job: Job) -> Run | None:
        """The run of ``job``, or ``None`` if it is still to be made."""
        path = self._path(job)
        if not path.is_file():
            return None
        stored = json.loads(path.read_text())
        return Run(**(stored | {"job": job, "error": math.nan if stored["error"] is None else stored["error"]}))

    def run(self, job: Job) -> Run:
        """The run of ``job``, made if it is not there."""
        run = self.done(job)
        if run is None:
            run = fine_tune(job, NETWORKS[job.network], self._data, self._weights)
            write_json(self._path(job), as_json(run))
        return run

    def _path(self, job: Job) -> Path:
        return self.folder / f"{job.key}.json"


def as_json(run: Run) -> dict[str, Any]:
    """A run as plain data; the error of a run that diverged is null."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(run).items()}


def beyond(rates: Sequence[float], best: float) -> float | None:
    """The next rate of the series 1, 3, 10, ... beyond an edge of ``rates``; ``None`` if ``best`` is at none.

    >>> beyond([0.01, 0.03], 0.01), beyond([0.01, 0.03], 0.03), beyond([0.01, 0.03, 0.1], 0.03)
    (0.003, 0.1, None)
    """
    if best not in (min(rates), max(rates)):
        return None
    series = [float(f"{digit}e{power}") for power in range(-9, 4) for digit in (1, 3)]
    if best == min(rates):
        return max((rate for rate in series if rate < 0.99 * best), default=None)
    return min((rate for rate in series if rate > 1.01 * best), default=None)


def walk(grid: Grid, args: Namespace) -> Iterator[Job]:
    """The jobs in their order: tuning arm by arm, then fresh seeds, all arms of each."""
    for network, steps in itertools.product(args.networks, args.steps):
        chosen = {}
        for arm in args.arms:
            rates: list[float] = []
            new: float | None = None
            while not rates or new is not None:
                more = args.rates if new is None else [new]
                rates += more
                for seed, rate in itertools.product(args.tuning_seeds, more):
                    yield Job(network, arm, rate, steps, seed, "tuning", args.precision)
                jobs = [
                    Job(network, arm, r, steps, s, "tuning", args.precision) for s in args.tuning_seeds for r in rates
                ]
                chosen[arm] = best_rate([(job.rate, grid.run(job).error) for job in jobs], arm)
                new = beyond(rates, chosen[arm]) if args.bracket else None
        for seed, arm in itertools.product(args.seeds, args.arms):
            yield Job(network, arm, chosen[arm], steps, seed, "report", args.precision)


def study(grid: Grid, args: Namespace, made: dict[str, Any]) -> None:
    """Make what is not there yet; ``finetune.json`` is renewed after each run."""
    each = len(args.arms) * (len(args.rates) * len(args.tuning_seeds) + len(args.seeds))
    runs = []

    def write() -> None:
        write_json(args.out / "finetune.json", {**made, "runs": [_flat(r) for r in runs]}, DIGITS)

    with tqdm(total=each * len(args.networks) * len(args.steps), desc="finetune", unit="run") as bar:
        for job in walk(grid, args):
            bar.set_postfix_str(job.key)
            new = grid.done(job) is None
            runs.append(grid.run(job))
            bar.update()
            if new:
                write()
    write()


def _flat(run: Run) -> dict[str, Any]:
    whole = as_json(run)
    return {**whole.pop("job"), **whole}


def arguments() -> Namespace:
    """The command line."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="folder of the public weights")
    parser.add_argument("--data", required=True, help="fashion-mnist, cifar10, or folder:PATH, in colour")
    parser.add_argument("--label", help="how results name the data")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision keeps what it downloads")
    parser.add_argument("--networks", nargs="+", default=["resnet20"], choices=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--arms", nargs="+", default=list(ARMS)[:3], choices=list(ARMS), metavar="ARM")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.03, 0.1])
    parser.add_argument("--bracket", action="store_true", help="go on beyond --rates until the best is at no edge")
    parser.add_argument("--steps", type=int, nargs="+", default=[200], help="lengths of the training")
    parser.add_argument("--precision", default="32", choices=["32", "bf16"], help="of the forward pass in training")
    parser.add_argument("--device", default="cpu", type=known_device, help="cpu, or cuda")
    parser.add_argument("--tuning-seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14, 15])
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="folder of the runs and their JSON")
    args = parser.parse_args()
    if set(args.seeds) & set(args.tuning_seeds):
        parser.error(
            f"--seeds {args.seeds} and --tuning-seeds {args.tuning_seeds} must differ: rates are chosen on the latter"
        )
    return args


def load(args: Namespace) -> tuple[Data, str]:
    """The images, decoded once and kept as tensors in ``--out``, and the name of the data set."""
    source = open_source(args.data, args.root, None)
    if source.in_chans != 3:
        raise BadInput(f"--data {args.data}: these networks take images in colour")
    name = args.label or source.name
    kept = args.out / f"images-{name.replace(':', '-')}.pt"
    if kept.is_file():
        stored = torch.load(kept, weights_only=True)
    else:
        source.download()
        decoded = {split: source.decode(split) for split in ("train", "test")}
        stored = {split: (images.pixels, images.labels) for split, images in decoded.items()}
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(stored, kept)
    test = some_of(Images(*stored["test"]), None)
    at = min(TUNING, len(test) // 2)
    parts = test.select(torch.arange(at)), test.select(torch.arange(at, len(test)))
    return Data(Images(*stored["train"]), *parts, source.num_classes), name


def main() -> None:
    """The script."""
    args = arguments()
    torch.set_num_threads(1)  # the sums come out the same on every machine
    try:
        data, name = load(args)
        data = data.to(args.device)
        given = {
            "networks": args.networks,
            "arms": args.arms,
            "rates": args.rates,
            "steps": args.steps,
            "precision": [args.precision],
        }
        given |= {"tuning-seeds": args.tuning_seeds, "seeds": args.seeds}
        flags = ["--bracket"] if args.bracket else []
        words = flags + [w for option, values in given.items() for w in (f"--{option}", *map(str, values))]
        places = ["--weights", "WEIGHTS", "--data", args.data.partition(":")[0] + ":DATA" * (":" in args.data)]
        made = {"command": shlex.join(["python", "recipes/evidence/finetune.py", *places, "--label", name, *words])}
        made |= {"data": name, "tuning_images": len(data.tuning), "test_images": len(data.report)}
        study(Grid(args.out / "runs", data, args.weights), args, made | provenance(torch.device(args.device)))
    except BadInput as error:
        leave("finetune.py", error)


if __name__ == "__main__":
    main()
