"""Clocks, and things timed in turns: what the benchmarks of the recipes share."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.record import DIGITS, write_json
from torch_meanfield import param_groups


def clock_of(device: torch.device, processor: bool = True) -> Callable[[], float]:
    """A clock in seconds for work on ``device``.

    Args:
        device: On CUDA the wall's time once the device is done.
        processor: On the CPU, count this process's processor time, which other work on the machine hardly changes;
            ``False`` for the wall's, where other processes work for this one.
    """
    if device.type == "cpu":
        return time.process_time if processor else time.perf_counter

    def wall() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return wall


def in_turns(
    contenders: dict[str, Callable[[], Any]],
    repeats: int,
    clock: Callable[[], float],
    label: str = "",
    warm_up: int = 1,
    inner: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each contender in each repeat.

    Each repeat runs every contender once, in an order that changes from repeat to repeat, so that the machine's drift
    hits all alike. Garbage is collected between the runs, not during them.

    Args:
        contenders: What to run, by name.
        repeats: At least 1.
        clock: See :func:`clock_of`.
        label: Shown while it runs.
        warm_up: Runs of each before the first that counts.
        inner: Runs of a contender in one repeat; the seconds are those of one, in the mean. More than one where the
            clock has to wait for a device.
    """
    for run in contenders.values():
        for _ in range(warm_up):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    gc.disable()
    try:
        for r in range(repeats):
            for name in names[r % len(names) :] + names[: r % len(names)]:
                gc.collect()
                begin = clock()
                for _ in range(inner):
                    contenders[name]()
                seconds[name].append((clock() - begin) / inner)
            print(f"\r  {label}: {r + 1}/{repeats}", end="", flush=True, file=sys.stderr)
    finally:
        gc.enable()
        print(file=sys.stderr)
    return seconds


def compared(seconds: dict[str, list[float]], over: str, under: str) -> dict[str, Any]:
    """Median seconds of both, the median over repeats of the ratio within one repeat, and its quartiles."""
    ratios = sorted(a / b for a, b in zip(seconds[over], seconds[under], strict=True))
    return {
        "seconds": {name: statistics.median(seconds[name]) for name in (over, under)},
        "ratio": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]],
        "repeats": len(ratios),
    }


def training_step(
    model: nn.Module, autocast: torch.dtype | None, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[Tensor, Tensor], None]:
    """A step on a batch: forward, backward, optimizer; by default the published protocol's SGD with momentum."""
    model.train()
    if optimizer is None:
        optimizer = torch.optim.SGD(param_groups(model, 0.1, 1e-4), momentum=0.9)

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def written(result: dict[str, Any], path: Path) -> None:
    """Write ``result`` as JSON."""
    write_json(path, result, DIGITS)
    print(f"written to {path}")
