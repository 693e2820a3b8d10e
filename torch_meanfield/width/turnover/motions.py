"""What is known of neurons travels with the block they live in, when blocks are re-sorted, cloned or killed."""

from __future__ import annotations

from collections.abc import Sequence

from torch_meanfield.particles import Motion, Slice, Stack
from torch_meanfield.width.turnover.tracked import Tracked, TrackedBlocks, TrackedNeurons


def follow_(tracked: Sequence[Tracked], motion: Motion) -> None:
    """Averages and initialisers go where ``motion`` took their block; what was recorded around it is dropped.

    A block that comes from a place without such a population brings no past: averages there begin anew.
    """
    if motion.cause in ("load", "follow"):
        return
    stacks = [c for c in motion.population.columns if isinstance(c, Stack)]
    if not stacks and motion.cause != "birth_death":  # an event has seen to what it moved
        _moved_by_others(tracked, motion)
    if not stacks or motion.born is not None:
        return
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


def _moved_by_others(tracked: Sequence[Tracked], motion: Motion) -> None:
    """Neurons that somebody else exchanged, or drew anew: what is known of them goes with them or is forgotten."""
    moved = {(id(c.tensor), c.dim) for c in motion.population.columns if isinstance(c, Slice)}
    for each in tracked:
        if isinstance(each, TrackedNeurons):
            outgoing = each.population.outgoing[0]
            if (id(outgoing.tensor), outgoing.dim) in moved:
                each.move_(motion.index) if motion.born is None else each.forget_(motion.born)
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
