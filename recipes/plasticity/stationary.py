#!/usr/bin/env python3
"""Nothing changes: does a method for changing data cost anything on data that stay?

    python recipes/plasticity/stationary.py [--root data] [--seeds 101 102 103] [--methods bare "library, plastic"]
                                         [--settings pixels standardised] [--out runs/plasticity]

12,000 images, averaged to 14 x 14, 15 epochs; the score is the accuracy on 10,000 others, the table has the last. An
MLP 196-64-64-10, batches of 16, Adam at 1e-3 or SGD at 0.1.
What is done stays: the same command goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from recipes.plasticity.study import main

if __name__ == "__main__":
    main("stationary", __doc__, ("pixels", "standardised", "layer norm", "SGD", "GELU"), "test accuracy")
