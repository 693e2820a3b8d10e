"""Births: what a place holds after its unit was drawn anew, or after one unit was split in two."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_meanfield.particles.neurons import Neurons
from torch_meanfield.particles.slices import read_rows, scale_rows_, write_rows_
from torch_meanfield.width.births.initialisers import Initializer, Law, particle_shape


def draw(
    population: Neurons, laws: dict[int, Law], count: int, generator: torch.Generator, initializer: Initializer | None
) -> dict[int, Tensor]:
    """Values for ``count`` newborn units, by column: incoming and own weights from their laws, outgoing ones 0."""
    values: dict[int, Tensor] = {}
    for i, column in enumerate(population.slices(population.columns)):
        shape = particle_shape(column, count)
        if i in laws:
            values[i] = laws[i].draw(shape, column.tensor.detach(), generator)
        else:
            values[i] = torch.zeros(shape, dtype=column.tensor.dtype, device=column.tensor.device)
    if initializer is not None:
        initializer([_flat(values[i], population, i) for i, r in enumerate(population.roles) if r == "in"], generator)
    return values


def _flat(value: Tensor, population: Neurons, i: int) -> Tensor:
    """``value`` as the user's tensor has it, particles along its own dimension (a view)."""
    column = population.slices(population.columns)[i]
    return value.flatten(column.dim, column.dim + 2) if column.outer == column.inner == 1 else value


def split_(population: Neurons, index: Tensor, jitter: float, generator: torch.Generator) -> None:
    r"""Share a parent's mass with its copies, after ``index`` has been carried out, so that the function is kept.

    A parent with m copies and its copies get :math:`1/(m+1)` of its outgoing weights each. Its copies' incoming
    weights move by a small random amount, the parent's by the opposite of their sum, which keeps the sum of
    the m + 1 units to first order; without it, copies would stay equal for ever.

    Args:
        population: the units.
        index: int64 ``(n,)``, already carried out: place i holds a copy of what place ``index[i]`` held.
        jitter: standard deviation of the moves, relative to the root mean square of each incoming column.
        generator: on the device of the population.
    """
    n = population.size
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
        noise = noise * value.to(wide).square().mean().sqrt() * jitter
        shape = (-1, *[1] * (value.ndim - column.dim - 2))
        noise = noise * copies.to(wide).view(shape)
        answer = torch.zeros_like(noise).index_add_(column.dim + 1, index, noise)
        write_rows_(column, places, value + (noise - answer * (1 - copies).to(wide).view(shape)).to(value.dtype))
