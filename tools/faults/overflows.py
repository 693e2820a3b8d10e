"""Mixed precision whose gradients overflow at random steps, against a run in which those steps never happened."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tools.faults.digits import Net, differences, digits, optimizer_of
from tools.faults.kills import clone
from torch_meanfield import subscribe


@dataclass
class Overflowed:
    """What became of one training.

    Args:
        steps: Taken.
        skipped: Steps that overflowed.
        moved: Skipped steps on which something changed, or moved.
        motions: Motions of all causes.
        ending: Parameters, buffers, optimizer state and population averages at the end.
    """

    steps: int
    skipped: int
    moved: list[int]
    motions: int
    ending: dict[str, Any]


def train(inner: type[torch.optim.Optimizer], options: dict[str, Any], batches: Iterable[int]) -> Overflowed:
    """Take one step for each number in ``batches``; a negative one stands for a step that overflows.

    All chance in a step comes from its number. The scale is a power of two, so that scaling rounds nothing. An overflow
    halves it for the steps that follow; not where births are placed by recorded gradients (``steep``), which are on
    its scale: a changed one weighs the steps of a window differently.
    """
    torch.manual_seed(0)
    net = Net()
    optimizer = optimizer_of(net, inner, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    images, labels = digits()
    parameters = list(net.parameters())
    motions: list[Any] = []
    moved, skipped, steps = [], 0, 0
    with subscribe(motions.append, model=net):
        for number in batches:
            torch.manual_seed(abs(number))
            index = torch.randint(len(images), (32,))
            optimizer.zero_grad()
            scaler.scale(net.loss(images[index], labels[index])).backward()
            if number < 0:
                victim = parameters[-number % len(parameters)]
                assert victim.grad is not None
                victim.grad.view(-1)[0] = torch.inf
                before, count = clone(_state(net, optimizer)), len(motions)
            scaler.step(optimizer)
            scaler.update(2.0**10 if options.get("steep", True) else None)
            steps += 1
            if number < 0:
                skipped += 1
                if len(motions) > count or differences(before, _state(net, optimizer)):
                    moved.append(steps)
    return Overflowed(steps, skipped, moved, len(motions), clone(_state(net, optimizer)))


def _state(net: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {"model": net.state_dict(), "optimizer": optimizer.state_dict()}


def overflow_and_compare(
    inner: type[torch.optim.Optimizer], options: dict[str, Any], steps: int, seed: int
) -> tuple[Overflowed, list[str]]:
    """Overflow at about a fifth of the steps, at random; what happened, and where the clean run ends elsewhere."""
    draw = random.Random(seed)
    numbers = [n if draw.random() > 0.2 else -n for n in range(1, steps + 1)]
    with_overflows = train(inner, options, numbers)
    without = train(inner, options, [n for n in numbers if n > 0])
    return with_overflows, differences(with_overflows.ending, without.ending)


OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD, fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW, fused": (torch.optim.AdamW, {"fused": True}),
}
