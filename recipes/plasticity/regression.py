#!/usr/bin/env python3
"""Bits that flip one by one: how much of a fixed network is explained after many flips?

    python recipes/plasticity/regression.py [--seeds 101 102 103] [--methods bare "library, plastic"]

Slowly changing regression (Dohare et al. 2024): 20 bits, of which 15 are alike for 1,600 samples and one of those
flips then; to imitate is a fixed network of 100 threshold units. The score of a task is the share of the variance
explained before each step, batches of 16; the table has the mean of the last 50 of 200 tasks. MLPs of 8 and of 64
units in each of two hidden layers, Adam at 1e-3.
What is done stays: the same command goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from recipes.plasticity.study import main

if __name__ == "__main__":
    main("regression", __doc__, ("8 units", "64 units"), "variance explained before each step")
