"""What is known of neurons travels with the block they live in, when blocks are re-sorted, cloned or killed."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch_meanfield.particles import Motion, Stack, subscribe
from torch_meanfield.particles.neurons import Neurons
from torch_meanfield.width.turnover.blocks import Blocks

if TYPE_CHECKING:
    from torch_meanfield.width.turnover.dynamics import Dynamics


def carry(dynamics: Dynamics) -> None:
    """Let ``dynamics`` follow the motions of whole blocks for as long as it lives."""
    ours = weakref.ref(dynamics)

    def on_motion(motion: Motion) -> None:
        alive = ours()
        if alive is not None and motion.born is None and motion.cause not in ("load", "follow"):
            move_known_(alive, motion)

    weakref.finalize(dynamics, subscribe(on_motion).remove)


def move_known_(dynamics: Dynamics, motion: Motion) -> None:
    """Averages and laws go where ``motion`` took their block; what was recorded around a moved layer is dropped.

    A block that comes from a place without such a population brings no past: averages there begin anew.
    """
    if not any(isinstance(c, Stack) for c in motion.population.columns):
        return  # neurons that moved: whoever moved them has seen to their averages
    for i, population in enumerate(dynamics.populations):
        if isinstance(population, Blocks) and population.module is motion.population.owner:
            averages, j = dynamics.where[i]
            averages.move_(j, motion.index)
    for at in _families(dynamics, motion):
        sources = {place: at.get(int(motion.index[place])) for place in at}
        old = {i: (dynamics.averages_of(i).clone(), dynamics.laws[i]) for i in at.values()}
        for place, i in at.items():
            source = sources[place]
            if source == i:
                continue
            if source is None or old[source][0].shape != old[i][0].shape:
                dynamics.averages_of(i).zero_()
            else:
                dynamics.averages_of(i).copy_(old[source][0])
                dynamics.laws[i] = old[source][1]
            if i in dynamics.recorders:
                dynamics.recorders[i].stop()


def _families(dynamics: Dynamics, motion: Motion) -> list[dict[int, int]]:
    """Neurons that exist once in each block: for each kind, the number of the population by its block's place."""
    stacks = [c for c in motion.population.columns if isinstance(c, Stack)]
    places = {id(t): (k, place) for k, stack in enumerate(stacks) for place, t in enumerate(stack.tensors)}
    families: dict[tuple[int, int], dict[int, int]] = {}
    for i, population in enumerate(dynamics.populations):
        if isinstance(population, Neurons):
            outgoing = population.outgoing[0]
            k, place = places.get(id(outgoing.tensor), (-1, -1))
            if k >= 0:
                families.setdefault((k, outgoing.dim), {})[place] = i
    return list(families.values())
