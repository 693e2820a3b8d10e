"""One fine-tuning of one arm: what it is, and how it ended."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.backbones.networks import Network
from recipes.evidence.arms import ARMS
from recipes.images.source import Images
from recipes.record import provenance
from torch_meanfield import Motion, conversion_report, subscribe

BATCH = 128
SEGMENTS = 10  # of a run, for its curve


@dataclass(frozen=True)
class Job:
    """What determines a run, beside data and weights."""

    network: str
    arm: str
    rate: float
    steps: int
    seed: int
    on: Literal["tuning", "report"] = "report"  # the test images that its error is of
    precision: Literal["32", "bf16"] = "32"  # of the forward pass in training; all that is kept is float32

    @property
    def key(self) -> str:
        """A file name."""
        arm = self.arm.replace(", ", "-").replace(" ", "_")
        return f"{self.network}-{arm}-{self.rate:g}-{self.steps}-{self.precision}-{self.on}-{self.seed}"


@dataclass
class Run:
    """How a job ended.

    Attributes:
        error: Test error in percent on the images of the job; not a number if the run diverged.
        loss: Mean training loss of each tenth of the run.
        factors: The steps or factors at the end.
        resorts: How often blocks changed places.
        seconds: Of processor time.
        device: Where it was trained; older runs do not say.
    """

    job: Job
    error: float
    loss: list[float]
    factors: list[float] = field(default_factory=list)
    resorts: int = 0
    seconds: float = 0.0
    device: str = ""


@dataclass(frozen=True)
class Data:
    """Decoded images: those to train on, those to choose rates by, those to report."""

    train: Images
    tuning: Images
    report: Images
    num_classes: int

    def to(self, device: torch.device | str) -> Data:
        """The images on ``device``, where networks are trained then."""
        parts = (images.to(device) for images in (self.train, self.tuning, self.report))
        return Data(*parts, self.num_classes)


def fine_tune(job: Job, network: Network, data: Data, weights: Path) -> Run:
    """SGD with momentum 0.9, mirrored images, a rate that falls to 0 as half a cosine.

    The arms of a seed see the same batches and begin with the same function.
    """
    begin, arm = time.process_time(), ARMS[job.arm]
    torch.manual_seed(job.seed)
    model = network.make(weights, data.num_classes).to(data.train.pixels.device, memory_format=torch.channels_last)
    model = arm.applied(model, network.prepared(data.train.pixels[:2])).train()
    moved: list[Motion] = []
    with subscribe(moved.append, model):
        losses = descend(
            model,
            arm.groups(model, job.rate),
            network,
            batches(data.train, job.steps, job.seed),
            Course(job.rate, job.steps, job.precision, round(arm.warmup * job.steps), arm.clip),
        )
    diverged = not math.isfinite(losses[-1])
    return Run(
        job,
        math.nan if diverged else error(model, network, data.tuning if job.on == "tuning" else data.report),
        in_segments(losses),
        factors_of(model, arm.form),
        sum(m.cause == "resort" for m in moved),
        time.process_time() - begin,
        provenance(data.train.pixels.device)["device"],
    )


@dataclass(frozen=True)
class Course:
    """How a training goes: the peak of its rate, its length, and the precision of its forward passes.

    Attributes:
        rising: Steps in which the rate rises.
        clip: Largest norm of the gradient; ``None``: not clipped.
    """

    rate: float
    steps: int
    precision: Literal["32", "bf16"] = "32"
    rising: int = 0
    clip: float | None = None


def descend(
    model: nn.Module, groups: Any, network: Network, drawn: Iterable[tuple[Tensor, Tensor]], course: Course
) -> list[float]:
    """Train ``model`` in place by SGD with momentum 0.9, its rate falling to 0 as half a cosine.

    Args:
        model: In the mode that it is to be trained in.
        groups: Parameters, or parameter groups.
        network: Prepares the pixels.
        drawn: ``uint8`` pixels and labels, a pair for each step.
        course: Rate, length and precision.

    Returns:
        the loss of each step; the last is not finite if the training diverged, and ended there.
    """
    optimizer = torch.optim.SGD(groups, lr=course.rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, course.steps, course.rising))
    losses: list[float] = []
    for pixels, labels in drawn:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=course.precision == "bf16"):
            loss = F.cross_entropy(model(network.prepared(pixels)), labels)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        if course.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), course.clip)
        optimizer.step()
        schedule.step()
    return losses


def factor(step: int, steps: int, rising: int = 0) -> float:
    """The learning rate at ``step`` over its peak."""
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def batches(images: Images, steps: int, seed: int, mirror: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    """``steps`` batches of pixels, half of them mirrored, and labels; in passes, always the same for a seed."""
    draws = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < min(BATCH, len(images)):
            order = torch.randperm(len(images), generator=draws)
        chosen, order = images.select(order[:BATCH]), order[BATCH:]
        mirrored = (torch.rand(len(chosen), generator=draws) < (0.5 if mirror else 0.0)).to(chosen.pixels.device)
        pixels = torch.where(mirrored[:, None, None, None], chosen.pixels.flip(3), chosen.pixels)
        yield pixels, chosen.labels


@torch.no_grad()
def error(model: nn.Module, network: Network, images: Images) -> float:
    """Test error in percent, in ``eval()``; the mode is put back."""
    training, wrong = model.training, 0
    model.eval()
    for index in torch.arange(len(images)).split(500):
        some = images.select(index)
        wrong += int((model(network.prepared(some.pixels)).argmax(1) != some.labels).sum())
    model.train(training)
    return 100 * wrong / len(images)


def in_segments(values: list[float], segments: int = SEGMENTS) -> list[float]:
    """The mean of each of ``segments`` equal parts."""
    edges = [round(i * len(values) / segments) for i in range(segments + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False) if b > a]


def factors_of(model: nn.Module, form: str) -> list[float]:
    """Steps of a converted model, stage by stage, or means of the learned factors."""
    if form == "converted":
        return [s for stage in conversion_report(model) if stage.module for s in stage.module.steps().tolist()]
    return [p.mean().item() for name, p in model.named_parameters() if name.endswith(".factor")]


def some_of(images: Images, count: int | None, seed: int = 0) -> Images:
    """The first ``count`` in an order that is always the same, or all of them so; folders come class by class."""
    order: Tensor = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.select(order[:count])
