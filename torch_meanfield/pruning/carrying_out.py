"""The removal itself: in the layers, in the model, in its averages, in optimizers and schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_meanfield.depth.shortening import check_keeps, keep_
from torch_meanfield.pruning.averaged import Average
from torch_meanfield.pruning.blocks import Block, blocks_of, layers_by_name
from torch_meanfield.pruning.owners import let_go_
from torch_meanfield.pruning.taking_out import take_out_


@dataclass(frozen=True)
class Plan:
    """Who stays.

    Attributes:
        blocks: all of the model.
        gone: names of those that go.
        slots: by layer, the slots of those that stay.
        sizes: by layer, how many there are.
    """

    blocks: tuple[Block, ...]
    gone: frozenset[str]
    slots: dict[str, list[int]]
    sizes: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module, gone: Sequence[Block]) -> Plan:
        """The plan by which ``gone`` go."""
        blocks, layers, names = blocks_of(model), layers_by_name(model), frozenset(b.name for b in gone)
        slots = {name: [b.slot for b in blocks if b.layer == name and b.name not in names] for name in layers}
        return cls(tuple(blocks), names, slots, {name: len(layer) for name, layer in layers.items()})

    @property
    def places(self) -> list[Block]:
        """The blocks in whose modules those that stay will be, in the order of these."""
        return [b for b in self.blocks if b.slot < len(self.slots[b.layer])]

    @property
    def last(self) -> list[Block]:
        """The blocks whose modules are taken out."""
        return [b for b in self.blocks if b.slot >= len(self.slots[b.layer])]


@dataclass(frozen=True)
class Company:
    """What is kept for the blocks outside of the model."""

    optimizers: Sequence[Optimizer]
    schedulers: Sequence[Any]
    averages: Sequence[Average]


def check_plan(model: nn.Module, plan: Plan, company: Company) -> None:
    """Raise what :func:`carry_out_` would raise for reasons that can be known beforehand."""
    for name, layer in layers_by_name(model).items():
        check_keeps(layer, plan.slots[name], company.optimizers)


def carry_out_(model: nn.Module, plan: Plan, company: Company, undo: ExitStack) -> tuple[dict[str, str], int]:
    """Carry ``plan`` out; returns the new names of modules by their old ones, and how many optimizers lost some."""
    lost: list[Tensor] = []
    for name, layer in layers_by_name(model).items():
        if len(plan.slots[name]) < plan.sizes[name]:
            lost += keep_(layer, plan.slots[name], company.optimizers, undo=undo)
            lost += [] if plan.slots[name] else list(layer.tau_axis.parameters())
    units = [unit for block in plan.last for unit in block.units]
    for average in company.averages:
        take_out_(average.root, [average.name(u) for u in units if u.startswith(average.prefix)], undo)
    renamed = take_out_(model, units, undo)
    left = {id(p) for p in model.parameters()}  # something that blocks share with what stays
    lost = [t for t in lost if id(t) not in left]
    followed = [let_go_(optimizer, lost, company.schedulers, undo) for optimizer in company.optimizers]
    return renamed, sum(followed)
