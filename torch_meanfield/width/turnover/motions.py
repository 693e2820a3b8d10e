"""What is known of neurons travels with the block they live in, when blocks are re-sorted, cloned or killed."""

from __future__ import annotations

from collections.abc import Sequence

from torch_meanfield.particles import Motion, Stack
from torch_meanfield.width.turnover.tracked import Tracked, TrackedBlocks, TrackedNeurons


def follow_(tracked: Sequence[Tracked], motion: Motion) -> None:
    """Averages and initialisers go where ``motion`` took their block; what was recorded around it is dropped.

    A block that comes from a place without such a population brings no past: averages there begin anew.
    """
    if motion.born is not None or motion.cause in ("load", "follow"):
        return
    stacks = [c for c in motion.population.columns if isinstance(c, Stack)]
    if not stacks:
        return  # neurons that moved: whoever moved them has seen to their averages
    for each in tracked:
        if isinstance(each, TrackedBlocks) and each.population.module is motion.population.owner:
            each.move_(motion.index)
    for at in _families(tracked, stacks):
        old = {place: (each.rows.clone(), each.initialisers) for place, each in at.items()}
        for place, each in at.items():
            source = int(motion.index[place])
            if source == place:
                continue
            if source not in old or old[source][0].shape != each.rows.shape:
                each.rows.zero_()
            else:
                each.rows.copy_(old[source][0])
                each.initialisers = old[source][1]
            if each.recorder is not None:
                each.recorder.drop()


def _families(tracked: Sequence[Tracked], stacks: Sequence[Stack]) -> list[dict[int, TrackedNeurons]]:
    """Neurons that exist once in each block: for each kind, the population by its block's place."""
    places = {id(t): (k, place) for k, stack in enumerate(stacks) for place, t in enumerate(stack.tensors)}
    families: dict[tuple[int, int], dict[int, TrackedNeurons]] = {}
    for each in tracked:
        if isinstance(each, TrackedNeurons):
            outgoing = each.population.outgoing[0]
            k, place = places.get(id(outgoing.tensor), (-1, -1))
            if k >= 0:
                families.setdefault((k, outgoing.dim), {})[place] = each
    return list(families.values())
