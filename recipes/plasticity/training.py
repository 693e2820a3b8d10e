"""One training on one stream: by this package's optimizer, by the bare one, or by one of its peers."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from recipes.plasticity.backbone import Backbone
from recipes.plasticity.bits import BITS
from recipes.plasticity.network import ConvNet, Mlp, silent_share
from recipes.plasticity.peers import (
    ContinualBackprop,
    L2Init,
    Method,
    ReDo,
    SelfNormalisedResets,
    ShrinkPerturb,
    Upgd,
)
from recipes.plasticity.streams import Stream
from torch_meanfield import BirthDeathOptimizer

BATCH = 16


@dataclass(frozen=True)
class Setting:
    """A network, its inputs and its optimizer."""

    name: str
    standardised: bool = False
    norm: bool = False
    activation: str = "relu"
    optimizer: str = "adam"
    width: int = 64
    convolutions: bool = False
    backbone: str | None = None
    weights: Path | None = None

    def model(self, inputs: int, outputs: int) -> Mlp | ConvNet | Backbone:
        """A network of that many numbers in and out."""
        if self.backbone is not None:
            return Backbone(outputs, self.backbone, self.weights)
        if self.convolutions:
            return ConvNet(outputs, self.width)
        return Mlp(inputs, outputs, self.width, self.activation, self.norm)

    def bare(self, model: nn.Module) -> Optimizer:
        """Adam at 1e-3 or SGD at 0.1."""
        return Adam(model.parameters(), lr=1e-3) if self.optimizer == "adam" else SGD(model.parameters(), lr=0.1)


SETTINGS = {
    s.name: s
    for s in (
        Setting("pixels"),
        Setting("standardised", standardised=True),
        Setting("layer norm", norm=True),
        Setting("SGD", optimizer="sgd"),
        Setting("GELU", activation="gelu"),
        Setting("tanh", activation="tanh"),
        Setting("ConvNet", width=32, convolutions=True),
        Setting("8 units", width=8),
        Setting("64 units"),
        Setting("resnet18", backbone="resnet18"),
    )
}
PEERS: dict[str, type[Method]] = {
    "bare": Method,
    "L2-init": L2Init,
    "shrink and perturb": ShrinkPerturb,
    "continual backprop": ContinualBackprop,
    "ReDo": ReDo,
    "self-normalised resets": SelfNormalisedResets,
}
OURS: dict[str, dict[str, Any]] = {"library, default": {}, "library, plastic": {"scheme": "plastic"}}
METHODS = (*PEERS, "UPGD", *OURS)
BLIND = ("bare", "L2-init", "shrink and perturb", "UPGD", *OURS)  # those that need not see hidden units


@dataclass
class Run:
    """One training: its score at every task, at the end how many units are silent and were born, and of what code."""

    setting: str
    method: str
    seed: int
    score: float
    seconds: float
    curve: list[float] = field(default_factory=list)
    silent: float = 0.0
    births: int = 0
    commit: str | None = None


def train(stream: Stream, setting: Setting, method: str, seed: int, images: tuple[Tensor, Tensor] | None) -> Run:
    """One training on one stream; every method sees the same tasks, batches and initial weights.

    Args:
        images: as rows, with their classes; ``None`` for a stream that needs none.
    """
    begin = time.perf_counter()
    torch.manual_seed(seed)
    draws, generator = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    sizes = (BITS, 1) if images is None else (images[0].shape[1], int(images[1].max()) + 1)
    model = setting.model(*sizes)
    optimizer = setting.bare(model)
    births = 0
    if method == "UPGD":
        optimizer = Upgd(model.parameters(), generator)
    elif method in OURS:
        optimizer = BirthDeathOptimizer(
            optimizer, model, seed=seed, example_input=torch.rand(2, sizes[0]), **OURS[method]
        )

        def count(event: Any) -> None:
            nonlocal births
            births += len(event.born)

        optimizer.register_event_hook(count)
    peer = PEERS.get(method, Method)(cast(Any, model), optimizer, generator)
    curve, task = [], None
    for task in stream.walk(*(images or (torch.empty(0), torch.empty(0))), draws):
        seen = 0.0
        for _ in range(task.epochs):
            order = torch.randperm(len(task.y), generator=draws)
            for batch in order.split(BATCH):
                optimizer.zero_grad()
                out = model(task.x[batch])
                loss(out, task.y[batch]).backward()
                seen += goodness(out, task.y[batch]) * len(batch) if task.asked is None else 0
                peer.pull()
                optimizer.step()
                peer.act()
        curve.append(seen / len(task.y) if task.asked is None else asked(model, *task.asked))
    assert task is not None
    score = statistics.mean(curve[-stream.last :])
    seconds = time.perf_counter() - begin
    return Run(
        setting.name,
        method,
        seed,
        score,
        seconds,
        curve,
        0.0 if isinstance(model, Backbone) else silent_share(model, task.x),
        births,
    )


def loss(out: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of classes, mean square of numbers."""
    return nn.functional.mse_loss(out, y) if y.is_floating_point() else nn.functional.cross_entropy(out, y)


def goodness(out: Tensor, y: Tensor) -> float:
    """The share that is classified as ``y``, or of the variance of numbers (which is 1) that is explained."""
    if y.is_floating_point():
        return 1 - float((out.detach() - y).square().mean())
    return float((out.argmax(1) == y).float().mean())


@torch.no_grad()
def asked(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """:func:`goodness` of the model on ``x``, in evaluation."""
    model.eval()
    good = goodness(model(x), y)
    model.train()
    return good
