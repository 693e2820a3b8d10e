"""A callback that shows which units die and are born, and what the loss says of those that live."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim import Optimizer

from torch_meanfield.lightning.picture import save_picture
from torch_meanfield.record import BirthRecord, BirthRecorder, plot_births
from torch_meanfield.width import BirthDeathOptimizer


class BirthDeathMonitor(Callback):
    """Log births, deaths and potentials of every population of the trainer's :class:`.BirthDeathOptimizer`.

    To every logger of the trainer, whenever an event is due (each ``every`` steps of that optimizer):

    - ``birth_death/killed/POPULATION``, ``.../born/...`` and ``.../cloned/...``: units that died since the start, and
      what took their places: units drawn anew, or copies; each also as ``birth_death/killed/total`` and so on;
    - ``birth_death/events/POPULATION``: events that changed something, and ``birth_death/events/total``;
    - ``birth_death/dead/POPULATION``: units whose potential was exactly 0 for a whole window as the event came;
    - the averaged potentials as the event came: a histogram ``potential/POPULATION`` where the logger's experiment has
      ``add_histogram`` (TensorBoard), else their quantiles ``potential/POPULATION/q05`` to ``q95``.

    At the end of `fit`, ``births.png`` (see :func:`.plot_births`) is written to the log directory (without a logger:
    the trainer's root directory), if matplotlib is installed. The record is part of the checkpoint: a resumed run
    continues it.

    Tensors are read from the device only at events; without logger, plot and ``keep`` nothing is done at all. For other
    training loops see :class:`.BirthRecorder`.

    Args:
        plot: whether to write ``births.png``.
        title: title of the plot; ``None`` for none.
        keep: whether to record ``turnovers`` for your own use, without logger and plot too.

    Attributes:
        turnovers: by the population's name, what was recorded.

    Warns:
        UserWarning: the trainer has no :class:`.BirthDeathOptimizer`; nothing is recorded then.

    Example:
        >>> trainer = Trainer(callbacks=[BirthDeathMonitor()])  # doctest: +SKIP
    """

    def __init__(self, plot: bool = True, title: str | None = None, keep: bool = False) -> None:
        self.plot, self.title, self.keep = plot, title, keep
        self.turnovers: dict[str, BirthRecord] = {}
        self._recorder: BirthRecorder | None = None
        self._logged = -1  # the step of the last event that was logged

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizers, and follow their events from here on."""
        wrapped = [o for o in map(_unwrapped, trainer.optimizers) if isinstance(o, BirthDeathOptimizer)]
        if not wrapped:
            warnings.warn(
                "BirthDeathMonitor: the trainer has no BirthDeathOptimizer, so there is nothing to record; return one "
                "from configure_optimizers, or leave the callback out",
                stacklevel=2,
            )
        elif trainer.loggers or self.plot or self.keep:
            self._recorder = BirthRecorder(*wrapped, records=self.turnovers)
            self.turnovers, self._logged = self._recorder.records, self._recorder.last

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Read averages, if this step ends in an event."""
        if self._recorder is not None:
            self._recorder.before_step(trainer.global_step + 1, _unwrapped(optimizer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, if there was an event."""
        recorder = self._recorder
        if recorder is None or recorder.last == self._logged:
            return
        self._logged = recorder.last
        for logger in trainer.loggers:
            histogram = getattr(getattr(logger, "experiment", None), "add_histogram", None)
            values = recorder.metrics() | ({} if histogram else recorder.quantiles())
            logger.log_metrics(values, step=trainer.global_step)
            if histogram is not None:
                for name, row in recorder.potentials().items():
                    histogram(f"potential/{name}", row, trainer.global_step)

    @property
    def killed(self) -> int:
        """Units that have died since the start, in all populations."""
        return sum(sum(record.killed) for record in self.turnovers.values())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        if self.plot and self.turnovers:
            save_picture(trainer, "births.png", lambda: plot_births(self.turnovers, title=self.title))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop following, however the run ended."""
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop following, however the run ended."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """The record by population."""
        return {name: record.state_dict() for name, record in self.turnovers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the record of a checkpoint."""
        self.turnovers = {name: BirthRecord.from_state_dict(state) for name, state in state_dict.items()}


def _unwrapped(optimizer: Any) -> Any:
    """The user's optimizer inside Lightning's."""
    while isinstance(optimizer, LightningOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
