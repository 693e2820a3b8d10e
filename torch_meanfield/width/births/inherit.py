"""Births from a parent: exact copies, and units that are split in two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_meanfield.particles import Neurons
from torch_meanfield.particles.slices import read_rows, scale_rows_, write_rows_
from torch_meanfield.width.births.reinject import Reinject
from torch_meanfield.width.draws import Draws


@dataclass(frozen=True)
class Clone(Reinject):
    """``births="clone"``: an exact duplicate, with its optimizer state, as published (Rotskoff et al. 2019)."""

    inherits = True


@dataclass(frozen=True)
class Split(Clone):
    r"""``births="split"``: parent and copies share the parent's outgoing weights, so that the function is kept.

    A parent with m copies and its copies get :math:`1/(m+1)` of its outgoing weights each. Its copies' incoming
    weights move by a small random amount, the parent's by the opposite of their sum, which keeps the sum of
    the m + 1 units to first order; without it, copies would stay equal for ever.

    Args:
        jitter: standard deviation of the moves, relative to the root mean square of each incoming column.
    """

    jitter: float = 0.01

    def share_(self, population: Neurons, index: Tensor, draws: Draws) -> None:
        """See :meth:`.BirthRule.share_`."""
        n, generator = population.size, draws.on(index.device)
        places = torch.arange(n, device=index.device)
        double = any(c.tensor.dtype == torch.float64 for c in population.outgoing)
        copies = (index != places).to(torch.float64 if double else torch.float32)
        brood = torch.zeros_like(copies).index_add_(0, index, torch.ones_like(copies))
        for column in population.outgoing:
            scale_rows_(column, (1 / brood).index_select(0, index))
        # a parent whose own place was taken cannot answer for its copies; their moves then only cancel in the mean
        for column in population.incoming:
            value = read_rows(column, places)
            wide = torch.float64 if value.dtype == torch.float64 else torch.float32
            noise = torch.empty(value.shape, dtype=wide, device=value.device).normal_(generator=generator)
            noise = noise * value.to(wide).square().mean().sqrt() * self.jitter
            shape = (-1, *[1] * (value.ndim - column.dim - 2))
            noise = noise * copies.to(wide).view(shape)
            answer = torch.zeros_like(noise).index_add_(column.dim + 1, index, noise)
            write_rows_(column, places, value + (noise - answer * (1 - copies).to(wide).view(shape)).to(value.dtype))
