"""A long training with frequent events: what grows, what drifts, what gets slower."""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from tools.faults.digits import EVERY, Net, average_of, digits, optimizer_of
from torch_meanfield import subscribe
from torch_meanfield.depth import after_step
from torch_meanfield.particles import events, optimizer_state


@dataclass(frozen=True)
class Figures:
    """Before and after.

    Args:
        steps: Taken, the first tenth as warm-up.
        motions: re-sorts, births and whatever else moved particles.
        populations: Sizes, after the warm-up and at the end.
        counted: Hooks, subscribers, registered layers and optimizers, after the warm-up and at the end.
        memory: Resident MiB of the process, after the warm-up and at the end; 0 where the system does not tell.
        milliseconds: Milliseconds of processor time per step, in the first tenth after the warm-up and in the last.
    """

    steps: int
    motions: int
    populations: tuple[list[int], list[int]]
    counted: tuple[dict[str, int], dict[str, int]]
    memory: tuple[float, float]
    milliseconds: tuple[float, float]


def long_run(steps: int, seed: int = 0, progress: bool = False) -> Figures:
    """Train for ``steps`` (at least 20 events) and look at both ends."""
    tenth = steps // 10 - steps // 10 % EVERY  # hooks come and go with the window before an event
    torch.manual_seed(seed)
    net = Net()
    optimizer, average = optimizer_of(net), average_of(net)
    images, labels = digits()
    motions = 0

    def count(_: Any) -> None:
        nonlocal motions
        motions += 1

    def train(number: int) -> float:
        begin = time.process_time()
        for _ in range(number):
            index = torch.randint(len(images), (8,))
            optimizer.zero_grad()
            net.loss(images[index], labels[index]).backward()
            optimizer.step()
            average.update_parameters(net)
        return 1000 * (time.process_time() - begin) / number

    with subscribe(count, model=net):
        train(tenth)
        before = _look(net, average, optimizer)
        first = train(tenth)
        for part in range(7):
            train(tenth)
            if progress:
                print(f"\r  {(part + 3) * tenth:,} of {10 * tenth:,} steps", end="", file=sys.stderr, flush=True)
        last = train(tenth)
        after = _look(net, average, optimizer)
    if progress:
        print(file=sys.stderr)
    populations, counted, memory = zip(before, after, strict=True)
    return Figures(10 * tenth, motions, populations, counted, memory, (first, last))


def _look(net: Net, average: nn.Module, optimizer: Any) -> tuple[list[int], dict[str, int], float]:
    gc.collect()
    sizes = [p.size for p in optimizer.populations] + [len(net.stack)]
    return sizes, hooks(net, average, optimizer), _resident()


def hooks(net: nn.Module, average: nn.Module, optimizer: Any) -> dict[str, int]:
    """How many callbacks and registrations there are, of every kind that this library adds to."""
    modules = [*net.modules(), *average.modules()]
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_load_state_dict_post_hooks")
    found = {kind: sum(len(getattr(m, kind)) for m in modules) for kind in kinds}
    for each, name in ((optimizer, "wrapper"), (optimizer.optimizer, "optimizer")):
        found |= {f"{name}{k}": len(v) for k, v in vars(each).items() if k.startswith("_optimizer_")}
    found["global step hooks"] = len(torch_optimizer._global_optimizer_post_hooks)
    found["subscribers"] = len(events._subscribers)
    found["layers"] = len(after_step._layers)
    found["optimizers that stepped"] = len(optimizer_state._stepped)
    found["followers"] = sum(len(m.__dict__["_lineage"].followers) for m in modules if "_lineage" in m.__dict__)
    found["optimizer state"] = sum(len(state) for state in optimizer.state.values())
    return found


def _resident() -> float:
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 / 2**20 if status.exists() else 0.0
