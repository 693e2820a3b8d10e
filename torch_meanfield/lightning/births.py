"""A callback that shows which units die and are born, and what the loss says of those that live."""

from __future__ import annotations

import importlib.util
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torch_meanfield.record.plot_births import plot_births
from torch_meanfield.record.turnover import COUNTS, Turnover
from torch_meanfield.width import BirthDeathOptimizer, Event, Neurons
from torch_meanfield.width.turnover.blocks import Blocks

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


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

    Tensors are read from the device only at events; without logger, plot and ``keep`` nothing is done at all.

    Args:
        plot: whether to write ``births.png``.
        title: of the plot; ``None`` for none.
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
        self.turnovers: dict[str, Turnover] = {}
        self._handles: list[RemovableHandle] = []
        self._names: dict[int, str] = {}  # by the population's identity
        self._noted: dict[int, int] = {}  # by the optimizer's identity, its clock when it was last written down
        self._trainer: Trainer | None = None
        self._due = False

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
            self._trainer = trainer
            self._handles = [o.register_event_hook(partial(self._count, o)) for o in wrapped]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Read averages, if this step ends in an event."""
        wrapper = _unwrapped(optimizer)
        if not self._handles or not isinstance(wrapper, BirthDeathOptimizer) or not wrapper.enabled:
            return
        due = (wrapper.clock + 1) % wrapper.settings.every == 0 and wrapper.settings.active
        if due and wrapper.populations:
            self._note(wrapper)

    def _note(self, wrapper: BirthDeathOptimizer) -> None:
        """Write down how its populations are at the step that is being taken."""
        assert self._trainer is not None
        self._due = True
        self._noted[id(wrapper)] = wrapper.clock
        for population, (potentials, dead) in zip(wrapper.populations, _averages(wrapper), strict=True):
            name = self._name(population)
            turnover = self.turnovers.setdefault(name, Turnover(population.size))
            turnover.due(self._trainer.global_step + 1, int(dead.sum()), potentials.tolist())

    def _name(self, population: Neurons | Blocks) -> str:
        """The name under which ``population`` is recorded: its own, numbered if another one has it already."""
        if id(population) not in self._names:
            name, number, taken = population.name, 1, set(self._names.values())
            while name in taken:
                number += 1
                name = f"{population.name} ({number})"
            self._names[id(population)] = name
        return self._names[id(population)]

    def _count(self, wrapper: BirthDeathOptimizer, event: Event) -> None:
        if self._noted.get(id(wrapper)) not in (event.step - 1, event.step):
            # Populations found in this very step, or a step that Lightning did not announce: averages of after it.
            self._note(wrapper)
        self.turnovers[self._name(event.population)].happened(event.index, event.born)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, if there was an event."""
        if not self._due:
            return
        self._due = False
        values = {f"birth_death/dead/{name}": float(t.dead[-1]) for name, t in self.turnovers.items()}
        for count in COUNTS:
            each = {name: sum(getattr(t, count)) for name, t in self.turnovers.items()}
            values |= {f"birth_death/{count}/{name}": float(n) for name, n in each.items()}
            values[f"birth_death/{count}/total"] = float(sum(each.values()))
        events = {name: sum(k > 0 for k in t.killed) for name, t in self.turnovers.items()}
        values |= {f"birth_death/events/{name}": float(n) for name, n in events.items()}
        values["birth_death/events/total"] = float(sum(events.values()))
        numbers = {name: torch.tensor(t.potentials, device="cpu") for name, t in self.turnovers.items()}
        at = torch.tensor(QUANTILES, device="cpu")
        quantiles = {
            f"potential/{name}/q{round(100 * q):02d}": v
            for name, row in numbers.items()
            for q, v in zip(QUANTILES, row.quantile(at).tolist(), strict=True)
        }
        for logger in trainer.loggers:
            histogram = getattr(getattr(logger, "experiment", None), "add_histogram", None)
            logger.log_metrics(values if histogram else values | quantiles, step=trainer.global_step)
            if histogram is not None:
                for name, row in numbers.items():
                    histogram(f"potential/{name}", row, trainer.global_step)

    @property
    def killed(self) -> int:
        """Units that have died since the start, in all populations."""
        return sum(sum(t.killed) for t in self.turnovers.values())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        folder = trainer.log_dir
        drawn = self.plot and self.turnovers and trainer.is_global_zero and not getattr(trainer, "fast_dev_run", 0)
        if drawn and folder is not None and importlib.util.find_spec("matplotlib"):
            figure = plot_births(self.turnovers, title=self.title)
            Path(folder).mkdir(parents=True, exist_ok=True)
            figure.savefig(Path(folder) / "births.png", dpi=150)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop following, however the run ended."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop following, however the run ended."""
        self._stop()

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._names, self._noted, self._trainer, self._due = [], {}, {}, None, False

    def state_dict(self) -> dict[str, Any]:
        """The record by population."""
        return {name: turnover.state_dict() for name, turnover in self.turnovers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the record of a checkpoint."""
        self.turnovers = {name: Turnover.from_state_dict(state) for name, state in state_dict.items()}


def _unwrapped(optimizer: Any) -> Any:
    """The user's optimizer inside Lightning's."""
    while isinstance(optimizer, LightningOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _averages(optimizer: BirthDeathOptimizer) -> list[tuple[Tensor, Tensor]]:
    """Averaged potentials and which units reach nothing, of each population, both ``(n,)`` on the CPU."""
    dynamics, out = optimizer._dynamics, []
    for i in range(len(optimizer.populations)):
        assert dynamics is not None
        averages, j = dynamics.where[i]
        quiet = averages.of(j)[3]
        dead = averages.mature(j) & (quiet >= optimizer.settings.window)
        potentials, gone = torch.stack([averages.mean(j), dead.to(averages.dtype)]).cpu()  # one read
        out.append((potentials, gone))
    return out
