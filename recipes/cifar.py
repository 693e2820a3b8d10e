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

from recipes.cli import run  # noqa: E402
from recipes.data import ImageData  # noqa: E402
from recipes.errors import BadInput, leave  # noqa: E402
from recipes.quiet import quieten  # noqa: E402
from recipes.task import ImageTask  # noqa: E402

def main() -> None:
    quieten()
    arguments, sys.argv = sys.argv[1:], sys.argv[:1]  # LightningCLI warns when it is given arguments and sees others
    try:
        run(ImageTask, ImageData, arguments)
    except BadInput as error:
        leave("cifar.py", error)


if __name__ == "__main__":
    main()
