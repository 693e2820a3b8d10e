"""One training, and what is left of it at every depth."""

from __future__ import annotations

import math
import time
from copy import deepcopy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.elastic.network import WAYS, Network
from recipes.evidence.training import BATCH, batches, factor
from recipes.images.source import Images
from recipes.pruning.task import error
from torch_meanfield import param_groups
from torch_meanfield.pruning import depth_scores, prune_depth_

SCORED = 512  # images on which blocks are scored, and norms re-estimated
Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Job:
    """What determines a run, beside the data.

    Attributes:
        way: Name in :data:`.WAYS`.
        blocks: Of the network that is trained.
        seed: Of weights and batches.
    """

    way: str
    blocks: int
    seed: int
    channels: int = 16
    epochs: int = 8
    rate: float = 0.1

    @property
    def key(self) -> str:
        """A file name."""
        way = self.way.replace(", ", "-").replace(" ", "_").replace("=", "is")
        return f"{way}-{self.blocks}-{self.channels}-{self.epochs}-{self.rate:g}-{self.seed}"


@dataclass
class Run:
    """How a job ended.

    Attributes:
        errors: For each criterion the test error in percent by number of blocks kept, the whole network last.
        steps: The steps at the end, in the order of the blocks.
        agreement: Spearman's correlation of the step with the rise of the loss without the block.
        seconds: Of processor time.
    """

    job: Job
    errors: dict[str, dict[int, float]] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    agreement: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Data:
    """Images of one size: to train on, and to report."""

    train: Images
    test: Images
    num_classes: int
    mirror: bool = True

    def ready(self, pixels: Tensor) -> Tensor:
        """``uint8`` pixels as inputs, with mean 0 and deviation 1 over the training images."""
        some = self.train.pixels[:2000].float()
        return ((pixels.float() - some.mean()) / some.std()).contiguous(memory_format=torch.channels_last)


def trained(job: Job, data: Data) -> Network:
    """SGD with momentum 0.9, weight decay 1e-4, half a cosine to 0, mirrored images where a mirror image is one."""
    way = WAYS[job.way]
    torch.manual_seed(job.seed)
    net = Network(data.train.pixels.shape[1], data.num_classes, job.blocks, job.channels, way)
    net.to(data.train.pixels.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(param_groups(net, job.rate, 1e-4), lr=job.rate, momentum=0.9)
    total = job.epochs * max(1, len(data.train) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, total))
    draws = torch.Generator().manual_seed(job.seed)
    for step, (pixels, labels) in enumerate(batches(data.train, total, job.seed, data.mirror)):
        if way.drop:  # every other batch, half of the blocks at most
            net.pass_by_(int(torch.randint(job.blocks // 2 + 1, (), generator=draws)) if step % 2 else 0)
        if way.shrinks and step < total // 2:
            net.shrink_(0.5 ** (2 / total))
        loss = F.cross_entropy(net(data.ready(pixels)), labels)
        if way.penalty:
            loss = loss + way.penalty * net.blocks.steps().clamp_min(1e-6).sqrt().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.pass_by_(0)
    return net


def elastic(job: Job, data: Data, kept: list[int], criteria: list[str]) -> Run:
    """Train once, then let blocks go by each criterion, and measure at every number in ``kept``."""
    begin = time.process_time()
    net = trained(job, data)
    some = data.train.select(torch.arange(min(SCORED, len(data.train))))
    scoring = [(data.ready(p), y) for p, y in zip(some.pixels.split(BATCH), some.labels.split(BATCH), strict=True)]
    testing = [
        (data.ready(p), y) for p, y in zip(data.test.pixels.split(500), data.test.labels.split(500), strict=True)
    ]
    run = Run(job, steps=net.blocks.steps().tolist())
    whole = error(net, testing)
    for by in criteria:
        run.errors[by] = at_depths(net, by, kept, scoring, testing) | {job.blocks: whole}
    if WAYS[job.way].learn and job.blocks > 2:
        rise = dict(depth_scores(net, scoring, by="leave_one_out", progress=False))
        run.agreement = spearman(run.steps, list(rise.values()))
    run.seconds = time.process_time() - begin
    return run


def at_depths(net: Network, by: str, kept: list[int], scoring: Batches, testing: Batches) -> dict[int, float]:
    """The test error with each number of blocks, norms re-estimated, nothing trained."""
    scores = depth_scores(net, scoring, by=by, progress=False)  # type: ignore[arg-type]
    found = {}
    for count in sorted(k for k in kept if 1 <= k < len(net.blocks)):
        shorter = deepcopy(net)
        prune_depth_(shorter, keep=count, scores=scores, batches=scoring)
        found[count] = error(shorter, testing)
    return found


def spearman(one: list[float], other: list[float]) -> float | None:
    """Spearman's rank correlation; ``None`` where a side is constant."""
    from scipy.stats import spearmanr

    if len(set(one)) < 2 or len(set(other)) < 2:
        return None
    value = float(spearmanr(one, other).statistic)
    return None if math.isnan(value) else value
