"""One network cut in one way and fine-tuned: what it is, and how it ended."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recipes.backbones.networks import NETWORKS, Network
from recipes.cuts.channels import candidates, pruned, times
from recipes.evidence.arms import WEIGHT_DECAY
from recipes.evidence.training import BATCH, Course, Data, batches, descend, error, in_segments, some_of
from recipes.record import write_json
from torch_meanfield import convert, fold
from torch_meanfield.pruning import depth_scores, prune_depth_

CRITERIA = ("greedy", "leave_one_out", "fisher", "cosine", "ratio")
ARMS = (*CRITERIA, "random", "channels", "sibling", "whole")
REFERENCE = "greedy"  # channels are cut until they are as fast as this arm
ADAPTING = 0  # the seed of the one adaptation
Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Setting:
    """What all runs of a network share: how it was adapted, and on how many images blocks are scored."""

    network: str
    sibling: str | None = None
    adapt: int = 400
    adapt_rate: float = 0.01
    scored: int = 512
    precision: Literal["32", "bf16"] = "bf16"

    @property
    def key(self) -> str:
        """The beginning of file names."""
        return f"{self.network}-{self.adapt}-{self.adapt_rate:g}-{self.precision}-{self.scored}"


@dataclass(frozen=True)
class Job:
    """What determines a run, beside the setting: the arm, how many blocks go (0: none), and the fine-tuning."""

    arm: str
    removed: int
    rate: float
    steps: int
    seed: int
    on: Literal["tuning", "report"] = "report"  # the test images that its error is of

    @property
    def key(self) -> str:
        """The end of file names."""
        return f"{self.arm}-{self.removed}-{self.rate:g}-{self.steps}-{self.on}-{self.seed}"


@dataclass
class Run:
    """How a job ended.

    Attributes:
        error: Test error in percent on the images of the job; ``None`` if the run diverged.
        all: The same on all test images, those by which rates are chosen included; of reported runs.
        faster: Processor time of a forward pass of the whole network over that of this one, of reported runs.
        parameters: Of the plain network.
        gone: The blocks that were removed, or the way and ratio of channels.
        loss: Mean training loss of each tenth of the run.
        seconds: Of processor time.
    """

    job: Job
    error: float | None
    all: float | None = None
    faster: float | None = None
    parameters: int = 0
    gone: list[str] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    seconds: float = 0.0


class Workshop:
    """Adapts a network once, scores it once, and cuts copies of it; what was made lies in a folder.

    Args:
        setting: The network, and how it is adapted.
        data: Images.
        weights: Folder of the public weights.
        folder: Where adapted weights, orders and runs lie.
    """

    def __init__(self, setting: Setting, data: Data, weights: Path, folder: Path) -> None:
        self.setting, self.data, self._weights, self._folder = setting, data, weights, folder
        self.network: Network = NETWORKS[setting.network]
        some = some_of(data.train, setting.scored)
        parts = zip(some.pixels.split(BATCH), some.labels.split(BATCH), strict=True)
        self.scoring: Batches = [(self.network.prepared(pixels), labels) for pixels, labels in parts]

    def adapted(self, name: str) -> nn.Module:
        """The network of that name after its adaptation, which is done if it is not there; in ``train()``."""
        network, s = NETWORKS[name], self.setting
        path = self._folder / f"adapted-{name}-{s.adapt}-{s.adapt_rate:g}-{s.precision}.pt"
        torch.manual_seed(ADAPTING)  # of a new classifier
        model = network.make(self._weights, self.data.num_classes).to(memory_format=torch.channels_last).train()
        if path.is_file():
            model.load_state_dict(torch.load(path, weights_only=True))
        elif s.adapt:
            drawn = batches(self.data.train, s.adapt, ADAPTING)
            descend(model, groups(model), network, drawn, Course(s.adapt_rate, s.adapt, s.precision))
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            torch.save(model.state_dict(), partial)
            partial.replace(path)
        return model

    def order(self, by: str, seed: int = 0) -> list[str]:
        """The blocks in the order in which they go; for ``random`` one drawn by the seed."""
        if by == "random":
            model = convert(self.adapted(self.setting.network), self.scoring[0][0][:2])
            names = [name for name, _ in depth_scores(model, by="step", progress=False)]
            return [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))]

        def score() -> dict[str, Any]:
            begin = time.process_time()
            scores = depth_scores(self.adapted(self.setting.network), self.scoring, by=by)  # type: ignore[arg-type]
            return {"order": list(scores.order), "seconds": time.process_time() - begin}

        return list(self._kept(f"order-{by}", score)["order"])

    def without_blocks(self, by: str, count: int, seed: int = 0) -> tuple[nn.Module, list[str]]:
        """The plain network without the first ``count`` blocks of that order, norms re-estimated; and their names."""
        model, gone = self.adapted(self.setting.network), self.order(by, seed)[:count]
        prune_depth_(model, remove=gone, batches=self.scoring)
        return fold(model, self.scoring[0][0][:2]).to(memory_format=torch.channels_last), gone

    def candidates(self, count: int) -> list[dict[str, Any]]:
        """The ways to cut channels to the latency of the reference without ``count`` blocks."""

        def make() -> list[dict[str, Any]]:
            reference, _ = self.without_blocks(REFERENCE, count)
            return candidates(self.adapted(self.setting.network), self.network, self.scoring, reference)

        return list(self._kept(f"channels-{count}", make))

    def without_channels(self, count: int) -> tuple[nn.Module, list[str]]:
        """The network cut to that latency in the way of the least loss; and way and ratio."""
        best = min(self.candidates(count), key=lambda c: c["loss"])
        model = pruned(self.adapted(self.setting.network), self.network, self.scoring, best["way"], best["ratio"])
        return model, [f"{best['way']}, {best['ratio']:.3f}"]

    def cut(self, job: Job) -> tuple[nn.Module, list[str]]:
        """The network of the arm before it is fine-tuned, and what has gone."""
        if job.arm == "whole":
            return self.adapted(self.setting.network), []
        if job.arm == "sibling":
            assert self.setting.sibling is not None
            return self.adapted(self.setting.sibling), []
        if job.arm == "channels":
            return self.without_channels(job.removed)
        return self.without_blocks(job.arm, job.removed, job.seed)

    def run(self, job: Job) -> dict[str, Any]:
        """The run of ``job`` as plain data, made if it is not there."""
        return dict(self._kept(job.key, lambda: flat(self._fine_tuned(job))))

    def done(self, job: Job) -> bool:
        """Whether ``job`` has been run."""
        return self._path(job.key).is_file()

    def whole_errors(self) -> dict[str, float]:
        """Test errors of the adapted network as it is: on the images that are reported, and on all."""

        def measure() -> dict[str, float]:
            reported, everything = self._errors(self.adapted(self.setting.network))
            return {"error": reported, "all": everything}

        return dict(self._kept("whole", measure))

    def _fine_tuned(self, job: Job) -> Run:
        begin = time.process_time()
        torch.manual_seed(job.seed)
        model, gone = self.cut(job)
        run = Run(job, None, parameters=sum(p.numel() for p in model.parameters()), gone=gone)
        if job.on == "report":
            whole, ours = times([self.adapted(self.setting.network), model], self.scoring[0][0])
            run.faster = whole / ours
        drawn = batches(self.data.train, job.steps, job.seed)
        course = Course(job.rate, job.steps, self.setting.precision)
        losses = descend(model.train(), groups(model), self.network, drawn, course)
        run.loss = in_segments(losses)
        if math.isfinite(losses[-1]):
            if job.on == "tuning":
                run.error = error(model, self.network, self.data.tuning)
            else:
                run.error, run.all = self._errors(model)
        run.seconds = time.process_time() - begin
        return run

    def _errors(self, model: nn.Module) -> tuple[float, float]:
        sizes = len(self.data.report), len(self.data.tuning)
        reported, others = (error(model, self.network, images) for images in (self.data.report, self.data.tuning))
        return reported, (reported * sizes[0] + others * sizes[1]) / sum(sizes)

    def _kept(self, key: str, make: Any) -> Any:
        path = self._path(key)
        if not path.is_file():
            write_json(path, make())
        return json.loads(path.read_text())

    def _path(self, key: str) -> Path:
        return self._folder / f"{self.setting.key}-{key}.json"


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """All parameters with the weight decay of the fine-tuning comparison."""
    return [{"params": list(model.parameters()), "weight_decay": WEIGHT_DECAY}]


def flat(run: Run) -> dict[str, Any]:
    """A run as one row; what is not finite is null."""
    row = {**{k: v for k, v in vars(run).items() if k != "job"}, **vars(run.job)}
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return finite | {"loss": [x if math.isfinite(x) else None for x in run.loss]}
