"""Follow the particles of every layer of a model that learns its tau, in any training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_meanfield.depth.layer import MeanFieldLayer
from torch_meanfield.particles import Motion, subscribe
from torch_meanfield.particles.copying import whole
from torch_meanfield.record.trajectories import Trajectory

FORCES = ("tau_grad", "potential")


@dataclass(frozen=True)
class Forces:
    """What the loss says of the particles of one layer, n numbers under each name of :data:`FORCES`."""

    in_time: Mapping[str, list[float]]
    by_particle: Mapping[str, list[float]]


class TauRecorder:
    """Record where the particles of a model are in time, and when they change places.

    From the moment it is made until :meth:`close` it follows every motion of the model's particles. The device is read
    by :meth:`record` and, with ``forces``, by :meth:`before_step`; following costs no read.

    Args:
        model: the module whose mean-field layers with learnable tau are followed; there may be none.
        trajectories: trajectories by layer name to be continued, as after a resumed training. Those of layers that are
            not there, or have another number of particles, are left out.

    Attributes:
        trajectories: by layer name, what was recorded.
        taken: the optimizer steps taken so far, as :meth:`before_step` and :meth:`record` were told; a re-sort is
            counted in the step that follows.

    Example:
        >>> from torch_meanfield import MeanFieldSequential
        >>> model = MeanFieldSequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)), horizon=1.0)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with TauRecorder(model) as recorder:
        ...     recorder.record(0)
        ...     for step in range(1, 11):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(8, 4)).square().mean().backward()
        ...         recorder.before_step(step, forces=step % 5 == 0)
        ...         _ = optimizer.step()
        ...         if step % 5 == 0:
        ...             recorder.record(step)
        >>> (trajectory,) = recorder.trajectories.values()
        >>> trajectory.steps, len(trajectory.tau[-1]), len(trajectory.grad[-1])
        ([0, 5, 10], 3, 3)
        >>> sorted(recorder.metrics())[:2]
        ['potential//0', 'potential//1']

        A picture is drawn by :func:`.plot_tau`: ``plot_tau(recorder.trajectories).savefig("tau.png")``.
    """

    def __init__(self, model: nn.Module, trajectories: Mapping[str, Trajectory] | None = None) -> None:
        self._layers = {
            name: m
            for name, m in model.named_modules()
            if isinstance(m, MeanFieldLayer) and getattr(m.position(), "requires_grad", False)
        }
        known = trajectories or {}
        self.trajectories = {
            name: known[name] if name in known and len(known[name].who) == len(layer) else Trajectory(len(layer))
            for name, layer in self._layers.items()
        }
        self.taken = 0
        self._forces: dict[str, Forces] = {}
        self._forces_of = -1  # the step they led to
        self._in_time: dict[str, Tensor] = {}  # ascending positions, as they were last recorded
        self._handle = subscribe(self._follow, model)

    def _follow(self, motion: Motion) -> None:
        for name, layer in self._layers.items():
            if motion.population.owner is layer:
                self.trajectories[name].move(motion.index, self.taken + 1 if motion.cause == "resort" else None)

    def before_step(self, step: int, forces: bool = True) -> None:
        """Say that ``optimizer.step()`` comes next; needed only for exact steps of re-sorts, and for gradients.

        Args:
            step: the number of that step; the first one is 1.
            forces: whether to read the gradients and potentials that are recorded with that step. Potentials are not
                known with automatic re-sorting off, when slots are out of order.
        """
        self.taken = step - 1
        if forces:
            self._forces_of = step
            read = {name: self._read_forces(name, layer) for name, layer in self._layers.items()}
            self._forces = {name: found for name, found in read.items() if found is not None}

    def _read_forces(self, name: str, layer: MeanFieldLayer) -> Forces | None:
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

    def record(self, step: int) -> None:
        """Record the positions after ``step`` optimizer steps; a step is recorded once.

        Raises:
            ValueError: a layer has lost blocks since the recorder was made.
        """
        self.taken = step
        for name, layer in self._layers.items():
            trajectory = self.trajectories[name]
            if len(layer) != len(trajectory.who):
                raise ValueError(
                    f"TauRecorder: {name or type(layer).__name__} has {len(layer)} blocks, and had "
                    f"{len(trajectory.who)} when this recorder was made; after prune_depth_ make another one"
                )
            if trajectory.steps and trajectory.steps[-1] >= step:
                continue
            # By slot: with automatic re-sorting off, that is not the order of tau, which `layer.tau` has.
            by_slot = layer.tau_axis.read().clamp(min=0).cpu()
            forces = self._forces_at(name, step)
            trajectory.record(step, by_slot, *(forces.by_particle.get(key) for key in FORCES))
            self._in_time[name] = by_slot.sort().values

    def _forces_at(self, name: str, step: int) -> Forces:
        return self._forces.get(name, Forces({}, {})) if self._forces_of == step else Forces({}, {})

    def metrics(self) -> dict[str, float]:
        """What was recorded last as plain numbers, for a logger; empty if nothing was.

        ``tau/LAYER/L`` and ``step/LAYER/L`` are position and step size of the particle that is L-th in time,
        ``tau_grad/LAYER/L`` and ``potential/LAYER/L`` what was read before that step of the particle that was L-th in
        time then, ``resorts/LAYER`` and ``resorts/total`` the re-sorts since the start.
        """
        values: dict[str, float] = {}
        for name, tau in self._in_time.items():
            for key, row in self._forces_at(name, self.trajectories[name].steps[-1]).in_time.items():
                values |= {f"{key}/{name}/{i}": v for i, v in enumerate(row)}
            values |= {f"tau/{name}/{i}": t for i, t in enumerate(tau.tolist())}
            values |= {f"step/{name}/{i}": s for i, s in enumerate(tau.diff(prepend=tau.new_zeros(1)).tolist())}
            values[f"resorts/{name}"] = float(len(self.trajectories[name].resorts))
        if values:
            values["resorts/total"] = float(self.resorts)
        return values

    @property
    def last(self) -> int:
        """The step that was recorded last; -1 if none was yet."""
        return max((t.steps[-1] for t in self.trajectories.values() if t.steps), default=-1)

    @property
    def resorts(self) -> int:
        """Re-sorts of all layers since the start."""
        return sum(len(t.resorts) for t in self.trajectories.values())

    def close(self) -> None:
        """Stop following; what was recorded stays."""
        self._handle.remove()

    def __enter__(self) -> TauRecorder:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
