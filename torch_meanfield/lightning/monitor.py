"""A callback that shows where the particles of every mean-field layer are in time, and when they change places."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from torch_meanfield.lightning.picture import save_picture
from torch_meanfield.record import TauRecorder, Trajectory, plot_tau


class MeanFieldMonitor(Callback):
    """Log what every layer that learns its tau does, and draw the trajectories at the end.

    To every logger of the trainer, each ``every_n_steps`` optimizer steps:

    - ``tau/LAYER/L`` and ``step/LAYER/L``: position and step size of the particle that is L-th in time;
    - ``resorts/LAYER``: re-sorts since the start, and ``resorts/total`` for all layers;
    - ``tau_grad/LAYER/L``: the loss's derivative by the position of the particle that was L-th in time, in the step
      that led here (before any clipping);
    - ``potential/LAYER/L``: its potential in that step, the step size times the loss's derivative by it
      (:func:`.resample.potential`); not with automatic re-sorting off, when slots are out of order.

    At the end of `fit`, ``tau.png`` (positions and step sizes, see :func:`.plot_tau`) is written to the log directory
    (without a logger: the trainer's root directory), if matplotlib is installed. Trajectories and counts are part of
    the checkpoint: a resumed run continues them.

    Tensors are read from the device only on the steps that are recorded, and on none when there is no logger, no plot
    to make, and nothing to ``keep``; gradients only for a logger or to ``keep``. Re-sorts are counted in any case. A
    model without learnable tau (the vanilla twin) is left alone. For other training loops see :class:`.TauRecorder`.

    Args:
        every_n_steps: optimizer steps between two records.
        plot: whether to write ``tau.png``.
        title: title of the plot; ``None`` for none.
        keep: whether to record ``trajectories`` for your own use, without logger and plot too.

    Attributes:
        trajectories: by layer name, what was recorded.

    Raises:
        ValueError: ``every_n_steps`` is below 1.

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
        self._recorder: TauRecorder | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers, and follow their motions from here on."""
        self._recorder = TauRecorder(pl_module, self.trajectories)
        self.trajectories = self._recorder.trajectories
        self._record(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Read the gradients, if the step they belong to will be recorded."""
        step = trainer.global_step + 1
        if self._recorder is not None:
            read = step % self.every_n_steps == 0 and (bool(trainer.loggers) or self.keep)
            self._recorder.before_step(step, forces=read)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record and log, if it is time to."""
        # With gradient accumulation several batches share one global step; the second is no new one.
        if trainer.global_step % self.every_n_steps == 0:
            self._record(trainer)

    def _record(self, trainer: Trainer) -> None:
        recorder, step = self._recorder, trainer.global_step
        if recorder is None:
            return
        recorder.taken = step
        if recorder.last >= step or not (trainer.loggers or self.plot or self.keep):
            return
        recorder.record(step)
        values = recorder.metrics() if trainer.loggers else {}
        for logger in trainer.loggers if values else ():
            logger.log_metrics(values, step=step)

    @property
    def resorts(self) -> int:
        """Re-sorts of all layers since the start."""
        return sum(len(t.resorts) for t in self.trajectories.values())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the last step and draw."""
        self._record(trainer)
        if self.plot and self.trajectories:
            save_picture(trainer, "tau.png", lambda: plot_tau(self.trajectories, title=self.title, steps=True))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop following, however the run ended."""
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop following, however the run ended."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """Trajectories and counts by layer."""
        return {name: trajectory.state_dict() for name, trajectory in self.trajectories.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the trajectories of a checkpoint."""
        self.trajectories = {name: Trajectory.from_state_dict(state) for name, state in state_dict.items()}
        if self._recorder is not None:  # where the network is sharded, Lightning restores after on_fit_start
            self._recorder.trajectories = self.trajectories
