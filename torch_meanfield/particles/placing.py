"""Newborn particles: values that no particle owned before, put into some places of a population."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_meanfield.particles.events import Motion, publish
from torch_meanfield.particles.newborn_state import MOMENT_SHARE, begin_anew_, check_beginnings
from torch_meanfield.particles.optimizer_state import known_optimizers
from torch_meanfield.particles.population import Population, Slice
from torch_meanfield.particles.slices import write_rows_


@torch.no_grad()
def place_(
    population: Population,
    places: Tensor,
    values: Mapping[int, Tensor],
    *,
    optimizers: Iterable[Optimizer] = (),
    cause: str = "birth",
    moment_share: float = MOMENT_SHARE,
) -> Motion:
    """Write newborn particles into ``places``, in place, with gradient 0 and the state their optimizers begin with.

    What a newborn particle has from a parent is moved by :func:`transport_` beforehand; this writes what is new.
    Averaged copies take the values over as they are: an average with the particle that died there would be of
    neither.

    Args:
        population: the particles.
        places: int64 ``(k,)``, each at most once.
        values: for each column that is written, by its number, what the k newborn particles own there: the shape of
            ``Slice.by_particle`` with k for n.
        optimizers: optimizers beside those that have stepped in this process.
        cause: published with the motion.
        moment_share: second moments begin at this share of their mean; see :func:`.begin_anew_`.

    Returns:
        the motion that was published, its index the identity.

    Raises:
        TypeError: a column in ``values`` is not a ``Slice``, or an optimizer's state for newborn particles cannot be
            told. Nothing has been written then.
    """
    columns: dict[int, Slice] = {}
    for i in values:
        column = population.columns[i]
        if not isinstance(column, Slice):
            raise TypeError(f"{population.name}: column {i} is a {type(column).__name__}; newborn values go to a Slice")
        columns[i] = column
    known = known_optimizers(optimizers)
    for optimizer in known:
        check_beginnings(optimizer, [c.tensor for c in columns.values()])
    for i, column in columns.items():
        write_rows_(column, places, values[i])
        begin_anew_(column, places, known, moment_share)
    motion = Motion(population, torch.arange(population.size, device=places.device), cause, places, dict(values))
    publish(motion)
    return motion
