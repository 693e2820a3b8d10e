#!/usr/bin/env python3
"""Train a mean-field ResNet, or its vanilla twin, on images: the published protocol as a command.

    python recipes/cifar.py fit --data digits
    python recipes/cifar.py fit --data cifar10 --model.depth 56
    python recipes/cifar.py fit --data folder:PATH --model.learn_tau false --trainer.max_epochs 20
    python recipes/cifar.py test --data cifar10 --ckpt_path runs/cifar10/version_0/checkpoints/last.ckpt

``--data`` is digits (the default, needs no download), fashion-mnist, cifar10, cifar100, or folder:PATH, and chooses
the configuration in recipes/configs/ unless ``--config`` names one; in YAML it is ``data: {name: digits}``. Every
option is in ``python recipes/cifar.py fit --help``. Logs, checkpoints, the picture of the trajectories and run.json go
to runs/DATA/version_N/.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recipes.cli import RecipeCLI, run, spelled_out
from recipes.data import ImageData
from recipes.errors import BadInput, leave
from recipes.quiet import quieten
from recipes.task import ImageTask


def main() -> RecipeCLI:
    """Carry out ``sys.argv``; bad input ends the process with one line and exit code 2."""
    quieten()
    # In place: Lightning starts the other processes of a multi-device run with sys.argv.
    sys.argv[1:] = spelled_out(sys.argv[1:])
    try:
        return run(ImageTask, ImageData)
    except BadInput as error:
        leave("cifar.py", error)


if __name__ == "__main__":
    main()
