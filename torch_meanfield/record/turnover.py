"""The record of one population's births and deaths over training."""

from __future__ import annotations

from typing import Any

from torch import Tensor

COUNTS = ("killed", "born", "cloned")


class Turnover:
    """What happened to n units at each event.

    Args:
        n: number of units.

    Attributes:
        steps: the optimizer steps at which an event was due, ascending.
        killed, born, cloned: for each of them, the units that died, and those that came in their places: drawn anew, or
            copied from another unit. Killed is the sum of the other two: the population is kept.
        dead: for each of them, the units that reached nothing when the event came.
        potentials: the averaged potentials before the last event, by place.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.steps: list[int] = []
        self.killed: list[int] = []
        self.born: list[int] = []
        self.cloned: list[int] = []
        self.dead: list[int] = []
        self.potentials: list[float] = []

    def due(self, step: int, dead: int, potentials: list[float]) -> None:
        """Note how the population is when an event is due; nothing has happened yet."""
        self.steps.append(step)
        self.dead.append(dead)
        for name in COUNTS:
            getattr(self, name).append(0)
        self.potentials = potentials

    def happened(self, index: Tensor, born: Tensor) -> None:
        """Count an event.

        Args:
            index: int64, shape ``(n,)``: place i took over what place ``index[i]`` held.
            born: int64, shape ``(k,)``: the places that hold units drawn anew.
        """
        fresh = set(born.tolist())
        survivors = {source for place, source in enumerate(index.tolist()) if place not in fresh}
        self.killed[-1] += self.n - len(survivors)
        self.born[-1] += len(fresh)
        self.cloned[-1] += self.n - len(survivors) - len(fresh)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as lists and integers."""
        return {"n": self.n, **{k: list(v) for k, v in vars(self).items() if k != "n"}}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Turnover:
        """The record that :meth:`state_dict` described."""
        out = cls(state["n"])
        for name, value in state.items():
            if name != "n":
                setattr(out, name, list(value))
        return out
