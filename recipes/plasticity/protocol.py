#!/usr/bin/env python3
"""Permuted pixels as published: one image a step, 5,000 images a permutation, a network 784-300-150-10.

    python recipes/plasticity/protocol.py [--root data] [--seeds 101 102] [--methods bare "library, plastic"]
                                       [--settings "online AdamW"] [--tasks 200] [--out runs/plasticity]

The protocol of Elsayed and Mahmood (2024), input-permuted: every image is classified before it is trained on, and the
score is the share classified rightly over the whole stream. Published are a million steps, 200 tasks, of MNIST; here
are 20 tasks by default, of Fashion-MNIST (--data takes a folder), in which fewer are classified rightly. AdamW at 1e-4,
or SGD at 0.003 on inputs each of which is normalised by its own running mean and deviation.
What is done stays: the same command goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from recipes.plasticity.study import main

if __name__ == "__main__":
    main("protocol", __doc__, ("online AdamW", "online SGD, normalised"), "accuracy before each step")
