"""Mean-field ResNets beside their vanilla twin on digits: the blocks learn their times and change places."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything
from tqdm import tqdm

from recipes.images.data import ImageData
from recipes.images.task import ImageTask
from torch_meanfield.lightning import MeanFieldMonitor

DEPTH = 32

# What differs from the defaults. At unit spacing and the weights' learning rate no particle reaches its neighbour in so
# short a training; at spacing 1/n and three times that rate they change places, and the networks learn as well.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "vanilla": {"learn_tau": False},
    "mean-field": {},
    "mean-field, T = 1, tau lr x3": {"horizon": 1.0, "tau_lr_scale": 3.0},
}
DRAWN = "mean-field, T = 1, tau lr x3"


@dataclass
class Outcome:
    """One trained configuration; ``error`` in percent of the test images."""

    name: str
    error: float
    steps: int
    resorts: int
    seconds: float
    final_steps: dict[str, list[float]]
    monitor: MeanFieldMonitor


class Bar(Callback):
    """One line of progress for a whole training, short enough for a log file."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_fit_start(self, trainer: Trainer, pl_module: ImageTask) -> None:
        self.bar = tqdm(total=trainer.max_epochs, desc=f"{self.name:<42}", unit="epoch", mininterval=2)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: ImageTask) -> None:
        self.bar.set_postfix(train_error=f"{trainer.callback_metrics['train_error']:.1f} %", refresh=False)
        self.bar.update()

    def on_fit_end(self, trainer: Trainer, pl_module: ImageTask) -> None:
        self.bar.close()


def train(name: str, epochs: int, seed: int) -> Outcome:
    """Train and test one configuration."""
    seed_everything(seed, verbose=False)
    data = ImageData("digits")
    task = ImageTask(DEPTH, in_chans=data.in_chans, num_classes=data.num_classes, **CONFIGURATIONS[name])
    monitor = MeanFieldMonitor(every_n_steps=1, plot=False, keep=True)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[monitor, Bar(name)],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    begun = time.perf_counter()
    trainer.fit(task, data)
    seconds = time.perf_counter() - begun
    error = trainer.test(task, data, verbose=False)[0]["test_error"]
    layers = task.net.mean_field_layers()
    final = {layer: steps.steps().tolist() for layer, steps in layers.items()}
    return Outcome(name, error, trainer.global_step, monitor.resorts, seconds, final, monitor)
