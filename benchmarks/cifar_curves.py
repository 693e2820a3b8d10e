"""Error curves of ResNet-20, vanilla beside mean-field, on one data set: several seeds through the recipe itself.

    python benchmarks/cifar_curves.py --data folder:PATH --label cifar10-jpeg --epochs 6 --seeds 2

Each run is one call of ``recipes/cifar.py fit`` under the published protocol with the schedule shortened in
proportion. Finished runs are kept in ``--runs`` and not repeated, so an interrupted call can be given again. Writes
``cifar_curves.json``, ``.md`` and ``.png`` into ``--out``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TWINS = {"vanilla": "false", "mean-field": "true"}


def train(twin: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One finished run, made now unless it was made before."""
    folder = args.runs / f"{args.label}-resnet{args.depth}-{args.epochs}-{twin}-{seed}"
    finished = sorted(folder.glob("*/version_*/run.json"))
    if not finished:
        command = [
            sys.executable, "recipes/cifar.py", "fit", "--config", "recipes/configs/resnet20-cifar10.yaml",
            "--data", args.data, "--data.label", args.label, "--model.depth", str(args.depth),
            "--model.learn_tau", TWINS[twin], "--seed_everything", str(seed),
            "--trainer.max_epochs", str(args.epochs), "--trainer.default_root_dir", str(folder.resolve()),
        ]  # fmt: skip
        print(f"== {twin}, seed {seed}", flush=True)
        subprocess.run(command, cwd=ROOT, check=True)
        finished = sorted(folder.glob("*/version_*/run.json"))
    run = json.loads(finished[-1].read_text())
    return {"twin": twin, **run}


def table(runs: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Test error in percent after each epoch, a row for each run, and the mean of the last."""
    epochs = [int(e["epoch"]) + 1 for e in runs[0]["epochs"]]
    lines = [
        f"ResNet-{args.depth} on {args.label}, test error in % after each epoch (compare only within this table).",
        "",
        "| network | seed | " + " | ".join(f"epoch {e}" for e in epochs) + " | re-sorts |",
        "| --- | --- | " + "--- | " * (len(epochs) + 1),
    ]
    for run in runs:
        errors = " | ".join(f"{e['val_error']:.2f}" for e in run["epochs"])
        lines.append(f"| {run['twin']} | {run['seed']} | {errors} | {run['resorts']} |")
    for twin in TWINS:
        last = [r["epochs"][-1]["val_error"] for r in runs if r["twin"] == twin]
        lines.append(f"\n{twin}: {statistics.mean(last):.2f} % in the mean of {len(last)} seeds after the last epoch.")
    made = runs[0]
    command = f"benchmarks/cifar_curves.py --data folder:PATH --label {args.label} --epochs {args.epochs}"
    lines += [
        "",
        f"Made by `python {command} --seeds {args.seeds}` on {made['device']} with {made['threads']} thread(s), torch "
        f"{made['versions']['torch']}, commit {made['commit']}.",
        "",
    ]
    return "\n".join(lines)


def picture(runs: list[dict[str, Any]], args: argparse.Namespace, path: Path) -> None:
    """Training loss and test error of every run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    colours = {"vanilla": "tab:grey", "mean-field": "tab:blue"}
    for run in runs:
        epochs = [e["epoch"] + 1 for e in run["epochs"]]
        for axis, key in zip(axes, ("train_loss", "val_error"), strict=True):
            label = run["twin"] if run["seed"] == runs[0]["seed"] else None
            axis.plot(epochs, [e[key] for e in run["epochs"]], ".-", color=colours[run["twin"]], alpha=0.8, label=label)
    axes[0].set(xlabel="epoch", ylabel="training loss")
    axes[1].set(xlabel="epoch", ylabel="test error, %")
    axes[1].legend(frameon=False)
    figure.suptitle(f"ResNet-{args.depth} on {args.label}, {args.seeds} seeds, torch {runs[0]['versions']['torch']}")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="as in recipes/cifar.py, for example folder:PATH")
    parser.add_argument("--label", required=True, help="the name of the data set, printed with every result")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "cifar_curves")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if args.epochs < 1 or args.seeds < 1:
        parser.error("--epochs and --seeds must be at least 1")
    runs = [train(twin, seed, args) for seed in range(args.seeds) for twin in TWINS]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cifar_curves.json").write_text(json.dumps(runs, indent=1) + "\n")
    (args.out / "cifar_curves.md").write_text(table(runs, args))
    picture(runs, args, args.out / "cifar_curves.png")
    print((args.out / "cifar_curves.md").read_text())


if __name__ == "__main__":
    main()
