"""The births and deaths of one population over training."""

from __future__ import annotations

from typing import Any

from torch import Tensor

COUNTS = ("killed", "born", "cloned")


class BirthRecord:
    """What happened to n units at each event.

    Args:
        n: number of units.

    Attributes:
        steps: the optimizer steps at which an event was due, ascending.
        killed: for each event, the number of units that died.
        born: for each event, the number of units drawn anew in their places.
        cloned: for each event, the number of units copied into their places: ``killed`` less ``born``.
        dead: for each event, the units whose potential had been 0 for a whole window when it came.
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
        """Note the state of the population when an event is due; nothing has happened yet."""
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
    def from_state_dict(cls, state: dict[str, Any]) -> BirthRecord:
        """The record that :meth:`state_dict` described."""
        out = cls(state["n"])
        for name, value in state.items():
            if name != "n":
                setattr(out, name, list(value))
        return out


Turnover = BirthRecord  # its name in version 0.1, in checkpoints and imports
