"""A callback that shows where the particles of every mean-field layer are in time, and when they change places."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torch_meanfield.depth.layer import MeanFieldLayer
from torch_meanfield.particles import Motion, subscribe
from torch_meanfield.particles.copying import whole
from torch_meanfield.record.plot_tau import plot_tau
from torch_meanfield.record.trajectories import Trajectory

FORCES = ("tau_grad", "potential")


@dataclass(frozen=True)
class Forces:
    """What the loss says of the particles of one layer, n numbers under each name of :data:`FORCES`."""

    in_time: dict[str, list[float]]
    by_particle: dict[str, list[float]]


NONE = Forces({}, {})


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
    model without learnable tau (the vanilla twin) is left alone.

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
        self._forces: dict[str, Forces] = {}
        self._forces_of = -1  # the step they led to

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers, and follow their motions from here on."""
        self._layers = {
            name: m
            for name, m in pl_module.named_modules()
            if isinstance(m, MeanFieldLayer) and getattr(m.position(), "requires_grad", False)
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

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Read the gradients, if the step they belong to will be recorded."""
        step = trainer.global_step + 1
        if step % self.every_n_steps or not (trainer.loggers or self.keep):
            return
        self._forces_of = step
        self._forces = {name: f for name, layer in self._layers.items() if (f := self._read(name, layer)) is not None}

    def _read(self, name: str, layer: MeanFieldLayer) -> Forces | None:
        position = layer.position()
        if position is None or position.grad is None:
            return None
        tau, grad = layer.tau_axis.read(), whole(position.grad)
        rows = [tau.clamp(min=0), grad.to(tau.dtype)]
        potential = layer.potential() if layer.auto_resort else None
        rows += [] if potential is None else [potential]
        times, *found = torch.stack(rows).cpu()  # one read
        order, trajectory = times.argsort(stable=True), self.trajectories[name]
        return Forces(
            {key: row[order].tolist() for key, row in zip(FORCES, found, strict=False)},
            {key: trajectory.by_particle(row.tolist()) for key, row in zip(FORCES, found, strict=False)},
        )

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
            forces = self._forces.get(name, NONE) if self._forces_of == step else NONE
            trajectory.record(step, by_slot, *(forces.by_particle.get(key) for key in FORCES))
            if trainer.loggers:
                for key, row in forces.in_time.items():
                    values |= {f"{key}/{name}/{i}": v for i, v in enumerate(row)}
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
            figure = plot_tau(self.trajectories, title=self.title, steps=True)
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
