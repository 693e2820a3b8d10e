"""The curves of a training, kept in its checkpoints, so that a run in several pieces has them whole."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from recipes.record import write_json


class Curve(Callback):
    """Collect what each epoch logged as ``train_*`` and ``val_*``, and the seconds that `fit` took.

    Both are part of the checkpoint: a run that was interrupted and resumed has one curve, and the sum of the seconds of
    its pieces (without what an interrupted epoch had taken: it is done again). After each epoch they are also written
    to ``curve.json`` in the log directory, for whoever waits for the end.

    Attributes:
        epochs: One dictionary for each finished epoch: ``epoch`` (from 0), and what was logged; errors in percent.
    """

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self._before, self._begun = 0.0, time.perf_counter()
        self._val: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Wall time of `fit` so far, in all pieces."""
        return self._before + time.perf_counter() - self._begun

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._begun = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the evaluation; what is logged outlives its epoch, and not every epoch need have one."""
        if not trainer.sanity_checking:
            self._val = _logged(trainer, "val_")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the epoch; callbacks that write checkpoints come after this one."""
        self.epochs.append({"epoch": trainer.current_epoch, **_logged(trainer, "train_"), **self._val})
        self._val = {}
        folder = trainer.log_dir
        if (
            trainer.loggers
            and trainer.is_global_zero
            and folder is not None
            and not getattr(trainer, "fast_dev_run", 0)
        ):
            write_json(Path(folder) / "curve.json", {"epochs": self.epochs, "seconds": round(self.seconds, 1)})

    def state_dict(self) -> dict[str, Any]:
        """The curve and the seconds so far."""
        return {"epochs": [dict(epoch) for epoch in self.epochs], "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a curve."""
        self.epochs = [dict(epoch) for epoch in state_dict["epochs"]]
        self._before, self._begun = float(state_dict["seconds"]), time.perf_counter()


def _logged(trainer: Trainer, prefix: str) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}
