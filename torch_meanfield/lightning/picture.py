"""Pictures that callbacks write at the end of a training."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_picture(trainer: Trainer, name: str, draw: Callable[[], Figure]) -> None:
    """Write the figure to the log directory: on the first rank, if matplotlib is installed, and not in a dry run."""
    folder = trainer.log_dir
    shown = trainer.is_global_zero and not getattr(trainer, "fast_dev_run", 0)
    if shown and folder is not None and importlib.util.find_spec("matplotlib"):
        figure = draw()
        Path(folder).mkdir(parents=True, exist_ok=True)
        figure.savefig(Path(folder) / name, dpi=150)
