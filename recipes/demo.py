#!/usr/bin/env python3
"""The vanilla twin and mean-field ResNets side by side on digits: what `make demo` runs.

    python recipes/demo.py [--epochs 40] [--seed 0] [--out runs/demo]

Every configuration starts from the same weights and sees the same batches. Prints a table, and writes it (table.md)
with the picture of the trajectories (tau.png) and everything behind both (demo.json) to the folder ``--out``.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from tqdm import tqdm

from recipes.errors import BadInput, leave
from recipes.images.data import ImageData
from recipes.images.task import ImageTask
from recipes.quiet import quieten
from recipes.record import DIGITS, provenance, write_json
from torch_meanfield.lightning import MeanFieldMonitor, plot_tau

DEPTH = 32

# What differs from the defaults. At unit spacing and the weights' learning rate no particle reaches its neighbour in so
# short a training; at spacing 1/n and three times that rate they change places, and the networks learn as well.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "vanilla": {"learn_tau": False},
    "mean-field": {},
    "mean-field, T = 1, tau lr x3": {"horizon": 1.0, "tau_lr_scale": 3.0},
    "mean-field, T = 1, tau lr x3, random tau": {"horizon": 1.0, "tau_lr_scale": 3.0, "tau_init": "random"},
}
DRAWN = "mean-field, T = 1, tau lr x3"


@dataclass
class Outcome:
    """One trained configuration; ``error`` in percent of the test images."""

    name: str
    error: float
    steps: int
    resorts: int
    seconds: float
    final_steps: dict[str, list[float]]
    monitor: MeanFieldMonitor


class Bar(Callback):
    """One line of progress for a whole training, short enough for a log file."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_fit_start(self, trainer: Trainer, pl_module: ImageTask) -> None:
        self.bar = tqdm(total=trainer.max_epochs, desc=f"{self.name:<42}", unit="epoch", mininterval=2)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: ImageTask) -> None:
        self.bar.set_postfix(train_error=f"{trainer.callback_metrics['train_error']:.1f} %", refresh=False)
        self.bar.update()

    def on_fit_end(self, trainer: Trainer, pl_module: ImageTask) -> None:
        self.bar.close()


def train(name: str, epochs: int, seed: int) -> Outcome:
    """Train and test one configuration."""
    seed_everything(seed, verbose=False)
    data = ImageData("digits")
    task = ImageTask(DEPTH, in_chans=data.in_chans, num_classes=data.num_classes, **CONFIGURATIONS[name])
    monitor = MeanFieldMonitor(every_n_steps=1, plot=False, keep=True)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[monitor, Bar(name)],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    begun = time.perf_counter()
    trainer.fit(task, data)
    seconds = time.perf_counter() - begun
    error = trainer.test(task, data, verbose=False)[0]["test_error"]
    layers = task.net.mean_field_layers()
    final = {layer: steps.steps().tolist() for layer, steps in layers.items()}
    return Outcome(name, error, trainer.global_step, monitor.resorts, seconds, final, monitor)


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as a Markdown table, aligned so that it also reads well as it is."""
    head = ["configuration", "test error", "steps", "re-sorts", "seconds"]
    rows = [[o.name, f"{o.error:.1f} %", str(o.steps), str(o.resorts), f"{o.seconds:.0f}"] for o in outcomes]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]

    def line(row: list[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        return "| " + " | ".join(cells) + " |"

    return "\n".join(line(row) for row in [head, rule, *rows])


def draw(outcome: Outcome, seed: int, made_by: dict[str, Any], path: Path) -> None:
    """The picture: one panel for each stage."""
    trajectories = {f"stage {i + 1}": trajectory for i, trajectory in enumerate(outcome.monitor.trajectories.values())}
    versions = made_by["versions"]
    details = (
        f"digits (scikit-learn), seed {seed}, test error {outcome.error:.1f} %; horizon T = 1, tau at 3 times the "
        "learning rate, which falls at 50 % and 75 % of the steps.\nOne line: one residual block. Red ticks: re-sorts. "
        f"torch-meanfield {versions['torch-meanfield']}, torch {versions['torch']}, {made_by['device']}."
    )
    title = f"ResNet-{DEPTH} on digits: its residual blocks learn their order"
    plot_tau(trajectories, title=title, details=details).savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="The vanilla twin and mean-field ResNets side by side on digits.")
    parser.add_argument("--epochs", type=int, default=40, help="epochs for each configuration (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and crops (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write to (default: %(default)s)")
    args = parser.parse_args()
    quieten(chatter=True)
    # Images of 8x8 pixels leave a second thread nothing to do but wait, for minutes where other programs want the core.
    torch.set_num_threads(1)
    try:
        if args.epochs < 1:
            raise BadInput(f"--epochs {args.epochs}: train for at least one epoch")
        args.out.mkdir(parents=True, exist_ok=True)
    except (BadInput, OSError) as error:
        leave("demo.py", error)
    made_by = provenance(torch.device("cpu"))
    outcomes = [train(name, args.epochs, args.seed) for name in CONFIGURATIONS]

    text = table(outcomes)
    (args.out / "table.md").write_text(text + "\n")
    drawn = next(o for o in outcomes if o.name == DRAWN)
    draw(drawn, args.seed, made_by, args.out / "tau.png")
    result = {
        "data": "digits",
        "depth": DEPTH,
        "epochs": args.epochs,
        "seed": args.seed,
        **made_by,
        "runs": [
            {
                "configuration": o.name,
                "options": CONFIGURATIONS[o.name],
                "test_error_percent": o.error,
                "optimizer_steps": o.steps,
                "resorts": o.resorts,
                "seconds": round(o.seconds, 1),
                "final_step_sizes": o.final_steps,
            }
            for o in outcomes
        ],
    }
    write_json(args.out / "demo.json", result, DIGITS)
    print(f"\nResNet-{DEPTH} on digits, seed {args.seed}, {args.epochs} epochs, {made_by['device']}\n\n{text}\n")
    print("One of the 500 test images is 0.2 %, and this is one seed: too few to rank the networks.")
    print(f"Picture: {args.out / 'tau.png'}   data behind it: {args.out / 'demo.json'}")


if __name__ == "__main__":
    main()
