#!/usr/bin/env python3
"""Random labels, drawn anew, for a network of convolutions: which training goes on learning?

    python recipes/plasticity/convolutions.py [--root data] [--seeds 101 102 103] [--methods bare "library, plastic"]

As in labels.py (640 images of 14 x 14, 30 epochs a task, labels drawn anew, training accuracy at a task's end), for
three convolutions of 32 channels and a linear layer; a unit is a channel. 20 tasks; the table has the mean of the last
5.
What is done stays: the same command goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from recipes.plasticity.study import main

if __name__ == "__main__":
    main("convolutions", __doc__, ("ConvNet",), "training accuracy at a task's end")
