"""The positions of the particles of one layer over training, each particle followed from slot to slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class Trajectory:
    """Positions of n particles over training, one row for each record, one column for each *particle*.

    Slot l of a layer always holds the l-th particle in time, so a curve drawn slot by slot never shows a crossing.
    This keeps who is where: particle i is the one that was in slot i at the start.

    Args:
        n: number of particles.

    Attributes:
        steps: optimizer steps at which positions were recorded.
        tau: for each of these steps, n positions by particle.
        grad: likewise the loss's derivatives by the positions, in the step that led there; ``None`` where not known.
        potential: likewise the potentials, see :func:`torch_meanfield.depth.resample.potential`.
        who: for each slot, the particle in it.
        resorts: the steps at which the particles were re-sorted, ascending.
    """

    def __init__(self, n: int) -> None:
        self.steps: list[int] = []
        self.tau: list[list[float]] = []
        self.grad: list[list[float] | None] = []
        self.potential: list[list[float] | None] = []
        self.who = list(range(n))
        self.resorts: list[int] = []

    def record(
        self,
        step: int,
        tau: Tensor,
        grad: Sequence[float] | None = None,
        potential: Sequence[float] | None = None,
    ) -> None:
        """Append the positions at ``step``; a step is recorded once.

        Args:
            step: the number of optimizer steps taken.
            tau: the positions by slot, shape ``(n,)``.
            grad: n derivatives by particle: they were read before the last re-sort, see :meth:`by_particle`.
            potential: likewise n potentials.
        """
        if self.steps and step <= self.steps[-1]:
            return
        self.steps.append(step)
        self.tau.append(self.by_particle(tau.detach().tolist()))
        self.grad.append(None if grad is None else list(grad))
        self.potential.append(None if potential is None else list(potential))

    def by_particle(self, by_slot: Sequence[float]) -> list[float]:
        """Rearrange n numbers that are given by slot: the one of particle i comes i-th."""
        row = [0.0] * len(by_slot)
        for slot, particle in enumerate(self.who):
            row[particle] = by_slot[slot]
        return row

    def move(self, index: Tensor, resorted_at: int | None = None) -> None:
        """Follow a motion: slot i now holds what slot ``index[i]`` held.

        Where blocks die and are cloned the first copy stays who it was, and each further one goes on as one of the
        dead, whose line jumps there.

        Args:
            index: the source of each slot, int64, shape ``(n,)``.
            resorted_at: the step, if it was a re-sort; other motions (a checkpoint loaded, say) are not counted.
        """
        sources = index.tolist()
        freed = [particle for slot, particle in enumerate(self.who) if slot not in set(sources)]
        moved: list[int] = []
        for i, source in enumerate(sources):
            moved.append(freed.pop(0) if source in sources[:i] else self.who[source])
        self.who = moved
        if resorted_at is not None:
            self.resorts.append(resorted_at)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as lists and integers."""
        return {
            "steps": list(self.steps),
            "tau": [list(row) for row in self.tau],
            "grad": [None if row is None else list(row) for row in self.grad],
            "potential": [None if row is None else list(row) for row in self.potential],
            "who": list(self.who),
            "resorts": list(self.resorts),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Trajectory:
        """The trajectory that :meth:`state_dict` described."""
        out = cls(len(state["who"]))
        out.steps, out.who = list(state["steps"]), list(state["who"])
        out.tau = [list(row) for row in state["tau"]]
        unknown = [None] * len(out.steps)  # in checkpoints of version 0.1.0
        out.grad = [None if row is None else list(row) for row in state.get("grad", unknown)]
        out.potential = [None if row is None else list(row) for row in state.get("potential", unknown)]
        out.resorts = list(state["resorts"])
        return out
