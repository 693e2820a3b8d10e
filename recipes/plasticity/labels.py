#!/usr/bin/env python3
"""Random labels, drawn anew 40 times: which training goes on learning?

    python recipes/plasticity/labels.py [--root data] [--seeds 101 102 103] [--methods bare "library, plastic"]
                                       [--settings pixels standardised] [--out runs/plasticity]

640 images, averaged to 14 x 14, keep their pixels; at every task their labels are drawn anew and learned for 30 epochs.
The score of a task is the training accuracy at its end; the table has the mean of the last 8. An MLP 196-64-64-10,
batches of 16, Adam at 1e-3 or SGD at 0.1.
What is done stays: the same command goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from recipes.plasticity.study import main

if __name__ == "__main__":
    main(
        "labels",
        __doc__,
        ("pixels", "standardised", "layer norm", "SGD", "GELU"),
        "training accuracy at a task's end",
    )
