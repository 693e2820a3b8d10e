"""How long a forward pass takes, and what share of it each block has."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_meanfield.observe import run, undisturbed
from torch_meanfield.pruning.blocks import Block
from torch_meanfield.pruning.check import Example
from torch_meanfield.pruning.control import controlled, scoring_mode

REPEATS = 9


def seconds_of(model: nn.Module, example: Example, repeats: int = REPEATS) -> float:
    """Median seconds of a forward pass in ``eval()``."""
    with undisturbed(), scoring_mode(model, batch_statistics=False):
        return statistics.median([_timed(lambda: _run(model, example)) for _ in range(repeats + 1)][1:])


def fewest_for(share: float, model: nn.Module, order: Sequence[Block], example: Example) -> tuple[int, float]:
    """How many of the first blocks in ``order`` must go for ``share`` of the time, and the seconds of a whole pass.

    Raises:
        ValueError: all but one would not do.
    """
    shares = _share_of_each(model, order, example)
    left = 1.0
    for count, block in enumerate(order[:-1], start=1):
        left -= shares[block.name]
        if left <= share:
            return count, seconds_of(model, example)
    raise ValueError(
        f"prune_depth_: to_latency={share} cannot be reached: without all blocks but {order[-1].name} a forward pass "
        f"still takes {left:.2f} of its time"
    )


def _share_of_each(model: nn.Module, blocks: Sequence[Block], example: Example) -> dict[str, float]:
    """The share of each block in the time of a pass: of each part, the rest included, the least of several passes.

    Another process adds to some parts of some passes; the least time of each is without it.
    """
    rest = "the rest"
    least: dict[str, float] = {}
    for _ in range(REPEATS + 1):
        watch = _Stopwatch()
        with undisturbed(), scoring_mode(model, batch_statistics=False), controlled(model, blocks, watch):
            whole = _timed(lambda: _run(model, example))
        for name, seconds in {**watch.spent, rest: whole - sum(watch.spent.values())}.items():
            least[name] = min(seconds, least.get(name, seconds))
    whole = sum(least.values())
    return {b.name: least.get(b.name, 0.0) / whole for b in blocks}


class _Stopwatch:
    """Adds up the seconds in each block."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def __call__(self, block: Block, i: int, x: Tensor, forward: Callable[[], Any]) -> Any:
        found: list[Any] = []
        seconds = _timed(lambda: found.append(forward()))
        self.spent[block.name] = self.spent.get(block.name, 0.0) + seconds
        return found[0]


def _run(model: nn.Module, example: Example) -> Any:
    return run(model.get_submodule(example.path), example.inputs)


def _timed(call: Callable[[], Any]) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    cuda: Any = torch.cuda
    if cuda.is_initialized():
        cuda.synchronize()
