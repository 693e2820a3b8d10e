#!/usr/bin/env python3
"""Classes that arrive two by two at a converted timm backbone: does it still learn the last of them?

    python recipes/plasticity/incremental.py [--root data] [--weights FILE] [--seeds 101 102] [--methods bare]

At every task two more of the classes arrive, 100 images of each; the images of all that have arrived are trained on for
five epochs, in batches of 16, and the score is the accuracy on 1,000 others of the same classes (Dohare et al. 2024);
the table has the last. A ResNet-18 whose blocks are converted, from --weights (a state dict of resnet18) or from
scratch; Adam at 1e-3. Of the peers, those that need not see hidden units.
What is done stays: the same command goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from recipes.plasticity.study import main
from recipes.plasticity.training import BLIND

if __name__ == "__main__":
    main("incremental", __doc__, ("resnet18",), "test accuracy on the classes so far", BLIND)
