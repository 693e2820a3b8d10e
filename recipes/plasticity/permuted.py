#!/usr/bin/env python3
"""Permuted pixels, 60 times: how fast is a new task learned after many others?

    python recipes/plasticity/permuted.py [--root data] [--seeds 101 102 103] [--methods bare "library, plastic"]
                                       [--settings pixels standardised] [--out runs/plasticity]

4,800 images, averaged to 14 x 14, their pixels permuted anew at every task, each seen once in batches of 16. The score
of a task is the accuracy on each batch before it is trained on; the table has the mean of the last 20. An MLP
196-64-64-10, Adam at 1e-3.
What is done stays: the same command goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from recipes.plasticity.study import main

if __name__ == "__main__":
    main("permuted", __doc__, ("pixels", "standardised", "layer norm"), "accuracy before each step")
