"""Constants of blocks that travel with their particles: ``beta`` of a normaliser-free block differs by place.

A module's attribute stays at its place. Where parameters can make up for it (a factor before a linear layer is a factor
on its weight), the particle that began at place h sees them multiplied by ``beta_h / beta_here``, exactly 1 at first.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


class Carried(nn.Module):
    """At which place each particle began, by slot: the entry ``home``, shape ``(n,)``, that moves with the particles.

    Args:
        n: number of particles.
        like: where the blocks are, and how precise.
    """

    home: Tensor

    def __init__(self, n: int, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("home", torch.arange(n, device=like.device))
        self.dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        self._tables: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}  # no buffers: those are cast

    def factor(self, slot: int, table: tuple[float, ...]) -> Tensor:
        """The constant of the particle in ``slot`` over that of the slot; shape ``()``."""
        key = table, self.home.device
        if key not in self._tables:
            self._tables[key] = torch.tensor(table, dtype=self.dtype, device=self.home.device)
        values = self._tables[key]
        return values[self.home[slot]] / values[slot]

    def has_moved(self) -> bool:
        """Whether a particle is not at home (read from the device)."""
        here = torch.arange(len(self.home), device=self.home.device)
        return not self.home.is_meta and bool((self.home != here).any())

    def reset_parameters(self) -> None:
        """Every particle is at home."""
        self.home.copy_(torch.arange(len(self.home)))

    def _apply(self, fn: Any, recurse: bool = True) -> Carried:
        blank = self.home.is_meta
        cast(Any, super())._apply(fn, recurse)
        if blank and not self.home.is_meta:
            self.reset_parameters()  # to_empty(): what it found there are no places
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}
