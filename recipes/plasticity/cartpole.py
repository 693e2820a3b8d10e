#!/usr/bin/env python3
"""Reinforcement learning while the task changes: does a Q-network still learn the tenth pole?

    python recipes/plasticity/cartpole.py [--seeds 101 102 103] [--methods bare ReDo "library, plastic"]

CartPole of gymnasium (the extra `studies`): every 4,000 steps the pole's length, the force, the order and
signs of the observations and the sense of the actions are drawn anew, and nobody is told. Double DQN, an MLP 4-64-64-2,
Adam at 1e-3, a step on 32 remembered transitions after each step of the task, memory of 4,000. The score of a phase is
the mean return of its episodes (at most 500); the table has the mean of the last 5 of 10 phases.
What is done stays: the same command goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from recipes.plasticity.study import main

if __name__ == "__main__":
    main("cartpole", __doc__, ("DQN",), "mean return of a phase's episodes")
