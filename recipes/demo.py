#!/usr/bin/env python3
"""What the project is for, on scikit-learn's digits: what `make demo` runs, in three minutes on two cores.

    python recipes/demo.py [--tasks 20] [--epochs 40] [--seed 0] [--out runs/demo]

First a network that goes on learning where its twin stops: labels are drawn anew at each task. Then ResNets whose
blocks learn their times and change places, beside the vanilla one. Twins start from the same weights and see the same
batches.
Prints two tables, the same at every run on one machine, and writes them (table.md) with the picture of both (demo.png),
that of all times (tau.png) and everything behind them (demo.json) to the folder ``--out``.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from recipes.demonstration.changing_places import CONFIGURATIONS, DEPTH, DRAWN, Outcome, train
from recipes.demonstration.learning_on import LR, TWINS, learn
from recipes.demonstration.pictures import draw_both, draw_stages, learning_table, places_table
from recipes.errors import BadInput, leave
from recipes.images.sources import Digits
from recipes.quiet import quieten
from recipes.record import DIGITS, provenance, write_json


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="What torch-meanfield is for, on digits, in three minutes.")
    parser.add_argument("--tasks", type=int, default=20, help="tasks of random labels (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=40, help="epochs for each ResNet (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and crops (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write to (default: %(default)s)")
    return parser.parse_args()


def row(o: Outcome) -> dict[str, Any]:
    """One ResNet in demo.json."""
    return {
        "configuration": o.name,
        "options": CONFIGURATIONS[o.name],
        "test_error_percent": o.error,
        "optimizer_steps": o.steps,
        "resorts": o.resorts,
        "seconds": round(o.seconds, 1),
        "final_step_sizes": o.final_steps,
    }


def main() -> None:
    args = arguments()
    quieten(chatter=True)
    # Images of 8x8 pixels leave a second thread nothing to do but wait, for minutes where other programs want the core.
    torch.set_num_threads(1)
    try:
        for name in ("tasks", "epochs"):
            if getattr(args, name) < 1:
                raise BadInput(f"--{name} {getattr(args, name)}: train for at least one")
        args.out.mkdir(parents=True, exist_ok=True)
    except (BadInput, OSError) as error:
        leave("demo.py", error)
    made_by = provenance(torch.device("cpu"))
    images = Digits().decode("train")
    learners = [learn(name, images, args.tasks, args.seed) for name in TWINS]
    outcomes = [train(name, args.epochs, args.seed) for name in CONFIGURATIONS]

    text = f"{learning_table(learners)}\n\n{places_table(outcomes)}"
    (args.out / "table.md").write_text(text + "\n")
    drawn = next(o for o in outcomes if o.name == DRAWN)
    draw_both(learners, drawn, args.out / "demo.png")
    draw_stages(drawn, args.seed, made_by, args.out / "tau.png")
    settings = {"data": "digits", "depth": DEPTH, "epochs": args.epochs, "tasks": args.tasks, "lr_of_twins": LR}
    runs = {"twins": [asdict(each) for each in learners], "runs": [row(o) for o in outcomes]}
    write_json(args.out / "demo.json", {**settings, "seed": args.seed, **made_by, **runs}, DIGITS)
    print(f"\nscikit-learn's digits, seed {args.seed}, {made_by['device']}\n\n{text}\n")
    print("Above, labels are drawn anew at each task: Adam's units die, replaced ones go on learning (chance is 0.10).")
    print("Below, one of the 500 test images is 0.2 %, and this is one seed: too few to rank the networks.")
    print(f"Pictures: {args.out / 'demo.png'}, {args.out / 'tau.png'}   data behind them: {args.out / 'demo.json'}")


if __name__ == "__main__":
    main()
