"""Training-step time of mean-field over vanilla, interleaved in one run: median ratios, printed and written as JSON.

    python benchmarks/step_overhead.py --models resnet20,resnet56 --repeats 30

Each repeat times one step of every contender in an order that changes from repeat to repeat, so that the machine's
drift hits all alike; the figure is the median over repeats of the ratio within one repeat. Beside the library's own
step the table shows the naive multiply ``x + dtau * f(x)`` that the fold replaces.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

if __package__ in (None, ""):  # run as a script: the checkout's packages are found beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import clock_of, compared, in_turns, training_step, written
from recipes.record import provenance
from torch_meanfield import MeanFieldResNet, MeanFieldSequential


class NaiveStack(nn.Module):
    """The same learnable steps as a multiplication over whole activations, without any sorting."""

    def __init__(self, layer: MeanFieldSequential) -> None:
        super().__init__()
        self.branches = nn.ModuleList(layer)
        self.naive_steps = nn.Parameter(torch.ones(len(layer)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for branch, step in zip(self.branches, self.naive_steps.unbind(), strict=True):
            x = x + step * branch(x)
        return x


def contenders(depth: int) -> dict[str, nn.Module]:
    """Vanilla, mean-field and naively scaled networks with the same initial weights."""
    models = {}
    for name in ("vanilla", "mean-field", "naive multiply"):
        torch.manual_seed(0)
        models[name] = MeanFieldResNet(depth, learn_tau=name != "vanilla")
    naive = models["naive multiply"]
    for stage in naive.stages():
        if stage.particles is not None:
            stage.particles = NaiveStack(stage.particles)
    return models


def measure(depth: int, batch: int, repeats: int, device: torch.device, autocast: torch.dtype | None) -> dict:
    """Median seconds of each contender and median ratio to vanilla."""
    images = torch.randn(batch, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch,), device=device)
    models = {name: model.to(device) for name, model in contenders(depth).items()}
    # All parameters in one group: the naive stack is no layer that param_groups knows.
    steps = {
        name: partial(
            training_step(model, autocast, torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4)),
            images,
            labels,
        )
        for name, model in models.items()
    }
    inner = 1 if device.type == "cpu" else 10
    seconds = in_turns(steps, repeats, clock_of(device, processor=False), f"resnet{depth}", warm_up=3, inner=inner)
    against = {name: compared(seconds, name, "vanilla") for name in steps}
    return {
        "model": f"resnet{depth}",
        "batch": batch,
        "device": str(device),
        "autocast": str(autocast) if autocast else "off",
        "repeats": repeats,
        "seconds": {name: row["seconds"][name] for name, row in against.items()},
        "ratio": {name: row["ratio"] for name, row in against.items()},
        "ratio_quartiles": {name: row["quartiles"] for name, row in against.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet20,resnet56", help="comma-separated: resnet20, resnet56, ...")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step_overhead.json")
    args = parser.parse_args()
    if args.repeats < 1 or args.batch < 2:
        parser.error("--repeats must be at least 1 and --batch at least 2")
    if args.threads:
        torch.set_num_threads(args.threads)
    runs: list[tuple[torch.device, torch.dtype | None]] = [(torch.device("cpu"), None)]
    if torch.cuda.is_available():
        runs += [(torch.device("cuda"), None), (torch.device("cuda"), torch.bfloat16)]
    else:
        print("no CUDA device: GPU not measured")
    rows = []
    for device, autocast in runs:
        for model in args.models.split(","):
            rows.append(measure(int(model.removeprefix("resnet")), args.batch, args.repeats, device, autocast))
    print("| model | device | vanilla ms | mean-field / vanilla (quartiles) | naive multiply / vanilla |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        low, high = row["ratio_quartiles"]["mean-field"]
        print(
            f"| {row['model']} | {row['device']} ({row['autocast']}) | {1e3 * row['seconds']['vanilla']:.1f} "
            f"| {row['ratio']['mean-field']:.3f} ({low:.3f} to {high:.3f}) | {row['ratio']['naive multiply']:.3f} |"
        )
    written({**provenance(runs[-1][0]), "gpu_measured": torch.cuda.is_available(), "rows": rows}, args.out)


if __name__ == "__main__":
    main()
