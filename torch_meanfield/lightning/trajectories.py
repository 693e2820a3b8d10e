"""The path of every particle of one layer, followed by identity while re-sorting moves it between slots."""

from __future__ import annotations

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
        tau: for each of them, n positions by particle.
        who: for each slot, the particle in it.
        resorts: the steps at which the particles were re-sorted, ascending.
    """

    def __init__(self, n: int) -> None:
        self.steps: list[int] = []
        self.tau: list[list[float]] = []
        self.who = list(range(n))
        self.resorts: list[int] = []

    def record(self, step: int, tau: Tensor) -> None:
        """Append the positions ``tau`` (shape ``(n,)``, by slot) as those of ``step``; a step is recorded once."""
        if self.steps and step <= self.steps[-1]:
            return
        by_slot = tau.detach().tolist()
        row = [0.0] * len(by_slot)
        for slot, particle in enumerate(self.who):
            row[particle] = by_slot[slot]
        self.steps.append(step)
        self.tau.append(row)

    def move(self, index: Tensor, resorted_at: int | None = None) -> None:
        """Follow a motion: slot i now holds what slot ``index[i]`` held.

        Args:
            index: int64, shape ``(n,)``, a permutation of the slots.
            resorted_at: the step, if it was a re-sort; other motions (a checkpoint loaded, say) are not counted.
        """
        self.who = [self.who[source] for source in index.tolist()]
        if resorted_at is not None:
            self.resorts.append(resorted_at)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as lists and integers."""
        return {
            "steps": list(self.steps),
            "tau": [list(row) for row in self.tau],
            "who": list(self.who),
            "resorts": list(self.resorts),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Trajectory:
        """The trajectory that :meth:`state_dict` described."""
        out = cls(len(state["who"]))
        out.steps, out.who = list(state["steps"]), list(state["who"])
        out.tau = [list(row) for row in state["tau"]]
        out.resorts = list(state["resorts"])
        return out
