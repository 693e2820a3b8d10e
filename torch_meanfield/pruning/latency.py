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
    whole = seconds_of(model, example)
    each = _seconds_by_block(model, order, example)
    left = whole
    for count, block in enumerate(order[:-1], start=1):
        left -= each[block.name]
        if left <= share * whole:
            return count, whole
    raise ValueError(
        f"prune_depth_: to_latency={share} cannot be reached: without all blocks but {order[-1].name} a forward pass "
        f"still takes {left / whole:.2f} of its time"
    )


def _seconds_by_block(model: nn.Module, blocks: Sequence[Block], example: Example) -> dict[str, float]:
    times: dict[str, list[float]] = {b.name: [] for b in blocks}
    for repeat in range(REPEATS + 1):
        spent = dict.fromkeys(times, 0.0)

        def act(block: Block, i: int, x: Tensor, forward: Callable[[], Any], spent: dict[str, float] = spent) -> Any:
            found: list[Any] = []
            spent[block.name] += _timed(lambda: found.append(forward()))
            return found[0]

        with undisturbed(), scoring_mode(model, batch_statistics=False), controlled(model, blocks, act):
            _run(model, example)
        for name, seconds in spent.items() if repeat else ():
            times[name].append(seconds)
    return {name: statistics.median(found) for name, found in times.items()}


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
