#!/usr/bin/env python3
"""How tau should be placed and how fast it should learn: horizon, start and learning rate, on real images.

    python recipes/tau_study.py --data cifar10 [--depth 32] [--epochs 2] [--seeds 3] [--out runs/tau_study]
    python recipes/tau_study.py --data folder:PATH --label NAME --size 16 -- --trainer.precision bf16-mixed

Lu et al. 2020 leaves all three open. Every setting starts from the weights of the vanilla twin of its seed and sees the
same batches; the protocol is the published one, shortened. The seeds are done one after the other, so that an
interrupted study has whole seeds; the same command goes on from there. ``--out`` holds tau_study.md, tau_study.png and
tau_study.json, renewed after each run that ends, and the runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recipes.grids.tau_study import main

if __name__ == "__main__":
    main()
