"""A network that goes on learning, beside its twin that stops: digits whose labels are drawn anew at each task."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from recipes.plasticity.streams import Stream, inputs
from torch_meanfield import BirthDeathOptimizer

LR = 3e-3
BATCH = 16
TWINS: dict[str, dict[str, Any] | None] = {"Adam": None, 'Adam, scheme="plastic"': {"scheme": "plastic"}}


@dataclass
class Learner:
    """One of the twins after its last task.

    Attributes:
        name: a key of :data:`TWINS`.
        curve: training accuracy at the end of each task.
        silent: share of the hidden units that no image reaches any more.
        births: units replaced.
        seconds: of the training.
    """

    name: str
    curve: list[float]
    silent: float
    births: int
    seconds: float


def stream(tasks: int) -> Stream:
    """320 digits, their labels drawn anew at each of ``tasks`` tasks, 20 epochs each."""
    return Stream("labels", tasks=tasks, samples=320, epochs=20, last=5)


def network() -> nn.Sequential:
    """An MLP 64-64-64-10."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def learn(name: str, images: Any, tasks: int, seed: int) -> Learner:
    """Train one twin: the same initial weights, tasks and batches for both."""
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)
    x, model = inputs(images, standardised=False), network()
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    births: list[int] = []
    options = TWINS[name]
    if options is not None:
        optimizer = BirthDeathOptimizer(optimizer, model, seed=seed, example_input=x[:2], **options)
        optimizer.register_event_hook(lambda event: births.append(len(event.born)))
    curve, seen, begun = [], x, time.perf_counter()
    bar = tqdm(total=tasks, desc=f"{name:<42}", unit="task", mininterval=2)
    for task in stream(tasks).walk(x, images.labels, draws):
        for _ in range(task.epochs):
            for batch in torch.randperm(len(task.y), generator=draws).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(task.x[batch]), task.y[batch]).backward()
                optimizer.step()
        curve.append(accuracy(model, task.x, task.y))
        seen = task.x
        bar.update()
    bar.close()
    return Learner(name, curve, silent_share(model, seen), sum(births), time.perf_counter() - begun)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of ``x`` that is classified as ``y``."""
    return (model(x).argmax(1) == y).float().mean().item()


@torch.no_grad()
def silent_share(model: nn.Sequential, x: Tensor) -> float:
    """The share of the hidden units that are 0 on every row of ``x``."""
    silent = []
    for layer in model:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            silent.append((x == 0).all(0))
    return torch.cat(silent).float().mean().item()
