"""A callback that shows where the particles of every mean-field layer are in time, and when they change places."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.hooks import RemovableHandle

from torch_meanfield.depth.layer import MeanFieldLayer
from torch_meanfield.lightning.plot import plot_tau
from torch_meanfield.lightning.trajectories import Trajectory
from torch_meanfield.particles import Motion, subscribe


class MeanFieldMonitor(Callback):
    """Log positions, step sizes and re-sorts of every layer that learns its tau, and draw the trajectories at the end.

    To every logger of the trainer, each ``every_n_steps`` optimizer steps:

    - ``tau/LAYER/L`` and ``step/LAYER/L``: position and step size of the particle that is L-th in time;
    - ``resorts/LAYER``: re-sorts since the start, and ``resorts/total`` for all layers.

    At the end of `fit`, ``tau.png`` (see :func:`.plot_tau`) is written to the log directory (without a logger: the
    trainer's root directory), if matplotlib is installed. Trajectories and counts are part of the checkpoint: a resumed
    run continues them.

    The positions are read from the device only on the steps that are recorded, and on none when there is no logger, no
    plot to make, and nothing to ``keep``; re-sorts are counted even then. A model without learnable tau (the vanilla
    twin) is left alone.

    Args:
        every_n_steps: optimizer steps between two records.
        plot: whether to write ``tau.png``.
        title: of the plot; ``None`` for none.
        keep: whether to record ``trajectories`` for your own use, without logger and plot too.

    Attributes:
        trajectories: by layer name, what was recorded.

    Raises:
        ValueError: ``every_n_steps`` below 1.

    Example:
        >>> trainer = Trainer(callbacks=[MeanFieldMonitor(every_n_steps=50)])  # doctest: +SKIP
    """

    def __init__(
        self, every_n_steps: int = 50, plot: bool = True, title: str | None = None, keep: bool = False
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps!r}")
        self.every_n_steps, self.plot, self.title, self.keep = every_n_steps, plot, title, keep
        self.trajectories: dict[str, Trajectory] = {}
        self._layers: dict[str, MeanFieldLayer] = {}
        self._handle: RemovableHandle | None = None
        self._trainer: Trainer | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers, and follow their motions from here on."""
        self._layers = {
            name: m
            for name, m in pl_module.named_modules()
            if isinstance(m, MeanFieldLayer) and m.tau.requires_grad
        }
        for name in set(self.trajectories) - set(self._layers):
            del self.trajectories[name]
        for name, layer in self._layers.items():
            known = self.trajectories.get(name)
            if known is None or len(known.who) != len(layer):
                self.trajectories[name] = Trajectory(len(layer))
        self._trainer, self._handle = trainer, subscribe(self._follow, pl_module)
        self._record(trainer)

    def _follow(self, motion: Motion) -> None:
        for name, layer in self._layers.items():
            if motion.population.owner is layer:
                # The hook runs inside optimizer.step(), before Lightning counts that step.
                step = self._trainer.global_step + 1 if self._trainer and motion.cause == "resort" else None
                self.trajectories[name].move(motion.index, resorted_at=step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record and log, if it is time to."""
        # With gradient accumulation several batches share one global step; the second is no new one.
        if trainer.global_step % self.every_n_steps == 0:
            self._record(trainer)

    def _record(self, trainer: Trainer) -> None:
        if not (trainer.loggers or self.plot or self.keep):
            return
        step = trainer.global_step
        values: dict[str, float] = {}
        for name, layer in self._layers.items():
            trajectory = self.trajectories[name]
            if trajectory.steps and trajectory.steps[-1] >= step:
                return
            # By slot: with automatic re-sorting off, that is not the order of tau, which `layer.tau` has.
            by_slot = layer.tau_axis.read().clamp(min=0).cpu()
            trajectory.record(step, by_slot)
            if trainer.loggers:
                tau = by_slot.sort().values
                values |= {f"tau/{name}/{i}": t for i, t in enumerate(tau.tolist())}
                values |= {f"step/{name}/{i}": s for i, s in enumerate(tau.diff(prepend=tau.new_zeros(1)).tolist())}
                values[f"resorts/{name}"] = float(len(trajectory.resorts))
        if values:
            values["resorts/total"] = float(self.resorts)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)

    @property
    def resorts(self) -> int:
        """Re-sorts of all layers since the start."""
        return sum(len(t.resorts) for t in self.trajectories.values())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the last step and draw."""
        self._record(trainer)
        folder = trainer.log_dir
        drawn = self.plot and self.trajectories and trainer.is_global_zero and not getattr(trainer, "fast_dev_run", 0)
        if drawn and folder is not None and importlib.util.find_spec("matplotlib"):
            figure = plot_tau(self.trajectories, title=self.title)
            Path(folder).mkdir(parents=True, exist_ok=True)
            figure.savefig(Path(folder) / "tau.png", dpi=150)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop following, however the run ended."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop following, however the run ended."""
        self._stop()

    def _stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = self._trainer = None

    def state_dict(self) -> dict[str, Any]:
        """Trajectories and counts by layer."""
        return {name: trajectory.state_dict() for name, trajectory in self.trajectories.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the trajectories of a checkpoint."""
        self.trajectories = {name: Trajectory.from_state_dict(state) for name, state in state_dict.items()}
