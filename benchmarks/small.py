"""Training steps of networks so small that Python is the cost: ours over plain torch, interleaved in one run.

    python benchmarks/small.py --repeats 40

One thread, eager: forward, backward, ``zero_grad``, step. Each repeat times every contender in an order that changes
from repeat to repeat; the figure is the median over repeats of the ratio within one repeat.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if __package__ in (None, ""):  # run as a script: the checkout's packages are found beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import clock_of, compared, in_turns, table, written
from recipes.record import provenance
from torch_meanfield import BirthDeathOptimizer, MeanFieldSequential

Step = Callable[[], None]


class PlainStack(nn.Module):
    """The ordinary residual stack."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """Add every branch, one behind the other."""
        for branch in self.branches:
            x = x + branch(x)
        return x


def stepper(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Step:
    """One training step of ``model`` on ``x``."""

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def classifier(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """One training step of ``model`` on the next of 64 batches of 16 random images with random labels."""
    images, labels = torch.randn(64, 16, 196), torch.randint(10, (64, 16))
    turn = cycle(range(64))

    def step() -> None:
        i = next(turn)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[i]), labels[i]).backward()
        optimizer.step()

    return step


def depth() -> dict[str, Step]:
    """8 MLP branches of width 64 at batch 32, as a mean-field layer and as the ordinary residual stack."""
    steps = {}
    for kind in (MeanFieldSequential, PlainStack):
        torch.manual_seed(0)
        model = kind(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)) for _ in range(8)))
        steps[kind.__name__] = stepper(model, torch.optim.SGD(model.parameters(), lr=1e-4), torch.randn(32, 64))
    return steps


def width(kind: str, **settings: Any) -> dict[str, Step]:
    """An MLP 196-64-64-10 at batch 16, its optimizer wrapped and bare."""
    makes = {
        "SGD": lambda params: torch.optim.SGD(params, lr=0.01),
        "fused Adam": lambda params: torch.optim.Adam(params, lr=1e-3, fused=True),
    }
    steps: dict[str, Step] = {}
    for name in ("BirthDeathOptimizer", kind):
        torch.manual_seed(0)
        layers = (nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        model = nn.Sequential(*layers)
        optimizer = makes[kind](model.parameters())
        if name != kind:
            optimizer = BirthDeathOptimizer(optimizer, model, **settings)
        steps[name] = classifier(model, optimizer)
    return steps


# Each row: ours and the plain one, in this order, and the highest ratio that is allowed.
ROWS: dict[str, tuple[Callable[[], dict[str, Step]], float]] = {
    "depth: 8 branches of width 64, SGD": (depth, 1.15),
    "width: MLP 196-64-64-10, SGD": (partial(width, "SGD"), 1.25),
    "width: MLP 196-64-64-10, fused Adam": (partial(width, "fused Adam"), 1.25),
    "width: the same, scheme plastic": (partial(width, "fused Adam", scheme="plastic"), 1.25),
}


def measured(make: Callable[[], dict[str, Step]], repeats: int, inner: int, label: str) -> dict:
    """Median seconds of a step of each, and their ratio."""

    contenders = make()
    ours, plain = contenders
    return compared(in_turns(contenders, repeats, clock_of(torch.device("cpu")), label, inner=inner), ours, plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument(
        "--inner", type=int, default=200, help="steps of each contender in each repeat; 200 hold one event of births"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "small.json")
    args = parser.parse_args()
    if args.repeats < 1 or args.inner < 1:
        parser.error("--repeats and --inner must be at least 1")
    torch.set_num_threads(1)
    rows = {name: {**measured(make, args.repeats, args.inner, name), "bar": bar} for name, (make, bar) in ROWS.items()}
    lines = [
        (name, *(f"{1e6 * s:.0f}" for s in row["seconds"].values()), f"{row['ratio']:.3f}", row["bar"])
        for name, row in rows.items()
    ]
    print(table(("step", "ours, us", "plain, us", "ratio", "at most"), lines))
    written({**provenance(torch.device("cpu")), "threads": 1, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
