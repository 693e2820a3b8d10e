"""The blocks of a model that can be removed: the particles of its mean-field layers, by the names of their modules."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from torch_meanfield.convert import ConvertedStage
from torch_meanfield.depth import MeanFieldSequential
from torch_meanfield.depth.layer import MeanFieldLayer
from torch_meanfield.particles.averages import lineage_of
from torch_meanfield.particles.population import named_tensors


@dataclass(frozen=True)
class Block:
    """One particle of a mean-field layer.

    Attributes:
        name: qualified; of a particle of several modules, that of the module around them, or of the first of them.
        parts: qualified names of its modules, in the order they run in.
        layer: qualified name of the layer.
        slot: in the layer.
        units: qualified names of what is taken out of the model with it: its modules, or the one that holds nothing
            else.
        outside: for each part whether it puts out a branch that the model adds itself (see :class:`.ConvertedStage`).
    """

    name: str
    parts: tuple[str, ...]
    layer: str
    slot: int
    units: tuple[str, ...]
    outside: tuple[bool | None, ...] = field(default=(False,), compare=False)


def is_converted(model: nn.Module) -> bool:
    """Whether ``model`` holds mean-field layers; a folded model holds none."""
    return any(isinstance(m, MeanFieldLayer) for m in model.modules())


def layers_by_name(model: nn.Module) -> dict[str, MeanFieldLayer]:
    """The mean-field layers of ``model`` in the order of its modules, without those of averages that it holds."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MeanFieldLayer)}
    return {name: m for name, m in layers.items() if not lineage_of(m).following} or layers


def blocks_of(model: nn.Module) -> list[Block]:
    """Every removable block of ``model``, layer by layer."""
    return [b for name, layer in layers_by_name(model).items() for b in _of_layer(model, name, layer)]


def _of_layer(model: nn.Module, name: str, layer: MeanFieldLayer) -> Iterator[Block]:
    if isinstance(layer, MeanFieldSequential):
        for i in range(len(layer)):
            part = f"{name}.{i}".lstrip(".")
            yield Block(part, (part,), name, i, (part,))
        return
    assert isinstance(layer, ConvertedStage)
    names = {id(m): n for n, m in model.named_modules()}
    members = [tuple(names[id(m)] for m in blocks) for blocks in layer]
    depth = len(os.path.commonprefix([part.split(".")[:-1] for parts in members for part in parts]))
    modules = dict(model.named_modules())
    mine = named_tensors(layer).values()
    outside = getattr(layer, "outside", ()) or (False,) * len(members[0])
    for slot, parts in enumerate(members):
        units = _units(parts, depth if len(members) > 1 else depth - 1, modules, {id(t) for t in mine})
        first = units[0]
        yield Block(first, parts, name, slot, units, outside)


def _units(parts: tuple[str, ...], depth: int, modules: dict[str, nn.Module], stage: set[int]) -> tuple[str, ...]:
    """The module around ``parts`` that tells them from the layer's other particles, if it holds nothing else."""
    around = {".".join(part.split(".")[: depth + 1]) for part in parts}
    theirs = {id(t) for part in parts for t in named_tensors(modules[part]).values()} | stage
    inside = {id(t) for name in around for t in named_tensors(modules[name]).values()}
    numbered = all(name[-1:].isdecimal() for name in around)  # one of several, not what holds them
    return tuple(around) if len(around) == 1 and numbered and inside <= theirs else parts


def size_of(model: nn.Module, block: Block) -> int:
    """Number of parameters of ``block``."""
    seen: dict[int, Any] = {id(p): p for part in block.parts for p in model.get_submodule(part).parameters()}
    mine = {id(p) for layer in layers_by_name(model).values() for p in layer.tau_axis.parameters()}
    return sum(p.numel() for i, p in seen.items() if i not in mine)
