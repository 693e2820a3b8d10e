#!/usr/bin/env python3
"""Train a mean-field ResNet, or its vanilla twin, on images: the published protocol as a command.

    python recipes/cifar.py fit --data digits
    python recipes/cifar.py fit --data cifar10 --model.depth 56
    python recipes/cifar.py fit --data folder:PATH --model.learn_tau false --trainer.max_epochs 20
    python recipes/cifar.py test --data cifar10 --ckpt_path runs/cifar10/version_0/checkpoints/last.ckpt

``--data`` is digits (the default, needs no download), fashion-mnist, cifar10, cifar100, or folder:PATH, and chooses
the configuration in recipes/configs/ unless ``--config`` names one; in YAML it is ``data: {name: digits}``. Every
option is in ``python recipes/cifar.py fit --help``. Logs, checkpoints, the picture of the trajectories and run.json go to
runs/DATA/version_N/.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import logging  # noqa: E402
import warnings  # noqa: E402

from recipes.cli import run  # noqa: E402
from recipes.data import ImageData  # noqa: E402
from recipes.errors import BadInput, leave  # noqa: E402
from recipes.task import ImageTask  # noqa: E402

QUIET = (
    "does not have many workers",  # images in memory need none: a batch is one indexing operation
    "callbacks used to create the checkpoint",  # `validate` and `test` leave out those of training
    "`isinstance.treespec, LeafSpec",  # Lightning's own use of a function that torch has deprecated
)


def main() -> None:
    for message in QUIET:
        warnings.filterwarnings("ignore", message=f".*{message}")
    # The seed is in config.yaml and run.json; an announcement before an error would make it two lines.
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    arguments, sys.argv = sys.argv[1:], sys.argv[:1]  # LightningCLI warns when it is given arguments and sees others
    try:
        run(ImageTask, ImageData, arguments)
    except BadInput as error:
        leave("cifar.py", error)


if __name__ == "__main__":
    main()
