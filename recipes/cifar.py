#!/usr/bin/env python3
"""Train a mean-field ResNet, or its vanilla twin, on images: the published protocol as a command.

    python recipes/cifar.py fit --data digits
    python recipes/cifar.py fit --config recipes/configs/resnet56-cifar10.yaml
    python recipes/cifar.py fit --config recipes/configs/resnet56-cifar10.yaml --data folder:PATH --vanilla
    python recipes/cifar.py fit --data cifar10 --schedule 1/16 --precision bf16-mixed
    python recipes/cifar.py test --data cifar10 --ckpt_path runs/cifar10/version_0/checkpoints/last.ckpt

``--data`` is digits (the default, needs no download), fashion-mnist, cifar10, cifar100, or folder:PATH, and chooses
the configuration in recipes/configs/ unless ``--config`` names one; in YAML it is ``data: {name: digits}``. Short
forms: ``--epochs N`` for --trainer.max_epochs, ``--schedule F`` for a share of the configuration's epochs, at least
one, ``--precision P`` for --trainer.precision, ``--vanilla`` for --model.learn_tau false. Every option is in ``python
recipes/cifar.py fit --help``. On several devices: ``--trainer.strategy ddp`` or ``fsdp2``. Logs, checkpoints, the
picture of the trajectories and run.json go to runs/DATA/version_N/.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recipes.errors import BadInput, leave
from recipes.images.cli import RecipeCLI, run, spelled_out
from recipes.images.data import ImageData
from recipes.images.task import ImageTask
from recipes.quiet import quieten

OPTIONS = {"--epochs": "--trainer.max_epochs", "--precision": "--trainer.precision"}


def long_form(args: Sequence[str]) -> list[str]:
    """The arguments without the short forms, and with the configuration for the data set if none is given."""
    out: list[str] = []
    for word in args:
        option, equals, value = word.partition("=")
        out += ["--model.learn_tau", "false"] if word == "--vanilla" else [OPTIONS.get(option, option) + equals + value]
    return spelled_out(out)


def main() -> RecipeCLI:
    """Carry out ``sys.argv``; bad input ends the process with one line and exit code 2."""
    quieten()
    # In place: Lightning starts the other processes of a multi-device run with sys.argv.
    sys.argv[1:] = long_form(sys.argv[1:])
    try:
        return run(ImageTask, ImageData)
    except BadInput as error:
        leave("cifar.py", error)


if __name__ == "__main__":
    main()
