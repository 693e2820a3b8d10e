"""The one operation on a population: ``new[i] = old[index[i]]`` over everything a particle owns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_meanfield.particles.columns import Route
from torch_meanfield.particles.events import Motion, publish
from torch_meanfield.particles.optimizer_state import check_flat, check_state, check_trained, known_optimizers
from torch_meanfield.particles.population import Population, check_index, tensors_of


def check_transportable(
    population: Population, sources: Sequence[int], optimizers: Iterable[Optimizer] = ()
) -> list[Optimizer]:
    """The optimizers whose state moves with ``population``, or the error that :func:`transport_` would raise.

    For motions that write something first and must know beforehand that they can be completed.

    Args:
        population: the particles.
        sources: place i is to take what place ``sources[i]`` holds; of interest where a column is a :class:`.Stack`.
        optimizers: beside those that have stepped.
    """
    known = known_optimizers(optimizers)
    for optimizer in known:
        check_flat(optimizer, tensors_of(population.columns), population.name)
        for column in population.columns:
            check_state(optimizer, column, population.name)
    for column in population.columns:
        if column.owns_whole:
            check_trained(known, column, sources, population.name)
    return known


@torch.no_grad()
def transport_(
    population: Population,
    index: Tensor | Sequence[int],
    *,
    optimizers: Iterable[Optimizer] = (),
    cause: str = "transport",
    state: bool = True,
) -> Motion | None:
    """Put what particle ``index[i]`` owned into place i, for every i, in place.

    A permutation of the index re-sorts the population (Lu et al. 2020, Algorithm 1); an index with repetitions is
    birth and death (Rotskoff et al. 2019). Parameters, buffers, gradients, ``requires_grad``, optimizer state and the
    :class:`.Traits` of modules move together. No ``Parameter`` is replaced, and none changes its storage or strides:
    values are copied.

    Args:
        population: the particles.
        index: n integers in ``0..n-1``; int64 if a tensor.
        optimizers: optimizers to take along beside those that have stepped in this process (which are known).
        cause: published with the motion, see :class:`Motion`.
        state: whether gradients and optimizer state move too; ``False`` where they belong to other values, as after
            loading a checkpoint.

    Returns:
        the motion that was published, or ``None`` if the index (on the CPU) moves nothing.

    Raises:
        ValueError: an index of the wrong length or out of range; a tensor several of whose entries share one place
            in memory; a particle that would move to where the optimizer that trains it does not reach.
        TypeError: optimizer state that cannot be divided among the particles. Nothing has moved in either case.
    """
    n = population.size
    index = check_index(index, n, population.name)
    # An index on an accelerator is not read back: every place is then written, moved or not.
    places = (index != torch.arange(n, device="cpu")).nonzero().squeeze(1) if index.device.type == "cpu" else None
    if places is not None and not places.numel():
        return None
    _check_memory(population)
    # Whole tensors are moved one by one, so their sources must be known on the host; slices stay on their device.
    on_host = population.traits is not None or any(c.owns_whole for c in population.columns)
    sources = index.tolist() if on_host else []
    route = Route(index, places, sources)
    known = check_transportable(population, sources, optimizers) if state else []
    for column in population.columns:
        if state:
            for optimizer in known:
                column.move_state_(optimizer, route)
            column.move_gradients_(route)
        column.move_(route)
    if population.traits is not None:
        if state:
            population.traits.move_modes_(sources)
        population.traits.move_(sources)
    motion = Motion(population, index, cause)
    publish(motion)
    return motion


def _check_memory(population: Population) -> None:
    for tensor in tensors_of(population.columns):
        if any(n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(
                f"{population.name}: a tensor of shape {tuple(tensor.shape)} is expanded: several of its entries "
                f"share one place in memory and cannot be moved apart; pass .contiguous() or leave it out"
            )
