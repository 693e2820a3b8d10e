"""What a :class:`.MeanFieldResNet` is made of: from its arguments, or from the entries of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor

BlockType = Literal["basic", "bottleneck", "resnext"]
LAYERS_PER_BLOCK: dict[str, int] = {"basic": 2, "bottleneck": 3, "resnext": 3}
STAGES = 3
DEPTH = 20  # of a model that is made without a word on it


@dataclass(frozen=True)
class Depth:
    """How many blocks a network has, and of how many layers.

    Attributes:
        blocks: of each stage, with the one that opens it.
        layers: of one block.
    """

    blocks: tuple[int, ...]
    layers: int

    @property
    def total(self) -> int:
        """Layers with weights on the longest way: stem, blocks, classifier."""
        return self.layers * sum(self.blocks) + 2

    def __str__(self) -> str:
        return f"depth {self.total} (blocks of {self.layers} layers: {', '.join(map(str, self.blocks))})"


@dataclass(frozen=True)
class Architecture:
    """The arguments of :class:`.MeanFieldResNet` that its weights fix, by their names there."""

    blocks: tuple[int, ...]
    block: BlockType
    num_classes: int
    in_chans: int
    cardinality: int
    base_width: int
    learn_tau: bool


def checked_blocks(depth: int | None, blocks: Sequence[int] | None, block: str) -> tuple[int, ...]:
    """The blocks of each stage.

    Raises:
        ValueError: a depth that the block type does not have, both or wrong numbers of blocks, an unknown block type.
    """
    if block not in LAYERS_PER_BLOCK:
        raise ValueError(f"block must be one of {sorted(LAYERS_PER_BLOCK)}, got {block!r}")
    if blocks is None:
        return (_per_stage(DEPTH if depth is None else depth, block),) * STAGES
    if depth is not None:
        raise ValueError(f"depth and blocks both say how deep the network is; got {depth!r} and {blocks!r}, pass one")
    least = (0 if block == "basic" else 1, 1, 1)  # where the shape changes, a block must open the stage
    numbers = list(blocks) if isinstance(blocks, (tuple, list)) else []
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    if len(numbers) != STAGES or not whole or any(n < m for n, m in zip(numbers, least, strict=True)):
        raise ValueError(
            f"blocks must hold the number of blocks of each of the {STAGES} stages, at least "
            f"{', '.join(map(str, least))} for block={block!r}; got {blocks!r}"
        )
    return tuple(numbers)


def _per_stage(depth: int, block: str) -> int:
    period = STAGES * LAYERS_PER_BLOCK[block]
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < period + 2 or (depth - 2) % period:
        near = max(1, round((depth - 2) / period)) * period + 2 if isinstance(depth, int) else period + 2
        raise ValueError(
            f"depth must be {period}k + 2 for block={block!r} ({period + 2}, {2 * period + 2}, ...), got {depth!r}; "
            f"the nearest is {near}, and blocks=(...) takes any number for each stage"
        )
    return (depth - 2) // period


def depth_of(state_dict: Mapping[str, Any]) -> Depth | None:
    """How deep the network is that a checkpoint comes from; ``None`` if it is no such checkpoint."""
    last = f"stage{STAGES}."
    if not any(k.startswith(f"{last}opening.") for k in state_dict):
        return None
    # The last convolution of any block, so that a file which lacks one of them is not taken for another network's.
    numbers = (k.rpartition(".conv")[2].partition(".")[0] for k in state_dict if k.startswith(last) and ".conv" in k)
    layers = max((int(n) for n in numbers if n.isdecimal()), default=0)
    return Depth(tuple(_blocks_of(state_dict, f"stage{s + 1}.") for s in range(STAGES)), layers)


def _blocks_of(state_dict: Mapping[str, Any], stage: str) -> int:
    names = {k.split(".")[2] for k in state_dict if k.startswith(f"{stage}particles.")}
    opened = any(k.startswith(f"{stage}opening.") for k in state_dict)
    return opened + sum(name.isdecimal() for name in names)


def architecture_of(state_dict: Mapping[str, Any]) -> Architecture:
    """The network that a checkpoint comes from.

    Raises:
        ValueError: it holds no :class:`.MeanFieldResNet`, or lacks the entry that would tell its shape; it is named.
    """
    found = depth_of(state_dict)
    if found is None:
        some = ", ".join(list(state_dict)[:3])
        raise ValueError(
            f"state_dict is no checkpoint of a MeanFieldResNet: it lacks stage{STAGES}.opening (its entries begin with "
            f"{some or 'nothing'}); pass what model.state_dict() gave, without a prefix"
        )
    chans, in_chans = _shape(state_dict, "stem.weight", 4)[:2]
    block: BlockType = "basic" if found.layers == 2 else "resnext" if chans == 64 else "bottleneck"
    width, each = _shape(state_dict, f"stage{STAGES}.opening.branch.conv2.weight", 4)[:2]
    cardinality, base_width = (width // each, each // 2 ** (STAGES - 1)) if block == "resnext" else (8, 64)
    head = "fc.weight" in state_dict
    taus = [k for k in state_dict if k.endswith(".tau_axis.anchor")]
    learned = any(k.endswith(".tau_axis.offset") for k in state_dict)
    return Architecture(
        blocks=found.blocks,
        block=block,
        num_classes=_shape(state_dict, "fc.weight", 2)[0] if head else 0,
        in_chans=in_chans,
        cardinality=cardinality,
        base_width=base_width,
        learn_tau=learned or not taus,
    )


def _shape(state_dict: Mapping[str, Any], name: str, ndim: int) -> tuple[int, ...]:
    value = state_dict.get(name)
    if not isinstance(value, Tensor) or value.ndim != ndim:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"state_dict[{name!r}] must be a tensor of {ndim} dimensions, which tell the network; {found}")
    return cast("tuple[int, ...]", tuple(value.shape))
