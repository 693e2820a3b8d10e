#!/usr/bin/env python3
"""The published table of Lu et al. 2020 as a command: vanilla and mean-field twins, over rows and seeds.

    python recipes/table.py --rows resnet20,resnet56 --seeds 3
    python recipes/table.py --rows all --data folder:PATH --label NAME --schedule 1/16 --jobs 2
    python recipes/table.py --rows resnet20 -- --trainer.precision bf16-mixed --model.channels_last true

Each row is a configuration of recipes/configs/ on its own data set, or on the one that ``--data`` names. Several runs
are trained at once. A run that has finished is kept, one that was interrupted goes on from its last checkpoint: start
the same command again. ``--out`` then holds one JSON for each run (runs/), table.md, table.png and table.json, all
renewed after each run that ends. Further options of every run, behind ``--``, are those of recipes/cifar.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recipes.grids.table import main

if __name__ == "__main__":
    main()
