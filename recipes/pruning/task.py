"""The LightningModule of the recipe: a fine-tuning that begins with the removal of blocks."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recipes.errors import BadInput
from recipes.finetune.task import FinetuneTask
from torch_meanfield.pruning import PruneReport, depth_scores, prune_depth_

Batches = list[tuple[Tensor, Tensor]]


@dataclass
class Removal:
    """What is to go; one of the first three.

    Attributes:
        remove: How many blocks go.
        keep: How many stay.
        to_latency: Share of the time of a forward pass that is aimed at.
        by: The criterion, see :func:`torch_meanfield.pruning.depth_scores`.
        images: How many training images the blocks are scored on, and norms re-estimated.
    """

    remove: int | None = None
    keep: int | None = None
    to_latency: float | None = None
    by: Literal["greedy", "leave_one_out", "fisher", "cosine", "ratio", "step"] = "greedy"
    images: int = 512

    def __post_init__(self) -> None:
        targets = {"--remove": self.remove, "--keep": self.keep, "--to-latency": self.to_latency}
        given = [option for option, value in targets.items() if value is not None]
        if len(given) != 1:
            raise BadInput(
                f"{' and '.join(given) or 'no target'}: pass one of --remove N, --keep N and --to-latency SHARE"
            )
        if self.images < 2:
            raise BadInput(f"--prune.images {self.images}: blocks are scored on 2 images or more; a few hundred do")

    @property
    def target(self) -> dict[str, Any]:
        """The argument of ``prune_depth_`` that says how much goes."""
        return {"remove": self.remove, "keep": self.keep, "to_latency": self.to_latency}


@dataclass
class Cut:
    """What was removed, with what a resumed run cannot measure any more. Errors are in percent."""

    removed: list[str]
    blocks: int
    error_before: float
    error_after: float
    scores: dict[str, float] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    scored_in: float = 0.0


class PruneTask(FinetuneTask):
    """:class:`.FinetuneTask` of a network that loses blocks before it is trained.

    Attributes:
        cut: What went; ``None`` before it has.
        whole: The network as it was.
        converted: Whether its residual blocks had learnable times then.
        report: What :func:`torch_meanfield.pruning.prune_depth_` said.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.converted = bool(self.steps())
        self.cut: Cut | None = None
        self.report: PruneReport | None = None
        self.__dict__["whole"] = None  # no submodule: neither trained nor saved

    def check_weights(self, by: str) -> None:
        """Raise :class:`BadInput` for a network that has learned nothing that blocks could be judged by."""
        if self.told.startswith("random weights"):
            raise BadInput(
                "no weights, so nothing to remove by: pass --checkpoint FILE (recipes/finetune_timm.py leaves one as "
                "plain.pt), or --pretrained"
            )
        known = (getattr(self.net, "pretrained_cfg", None) or {}).get("num_classes")
        published = self.told.endswith("differs") and known != self.backbone.num_classes
        if ("left out" in self.told or published) and by in ("greedy", "leave_one_out", "fisher"):
            raise BadInput(
                f"the classifier is new, so --by {by}, which needs a loss, would score noise: fine-tune first with "
                f"recipes/finetune_timm.py and pass its plain.pt as --checkpoint, or pass --by cosine"
            )

    def cut_(self, wanted: Removal, scoring: Batches, testing: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Score, remove, re-estimate norms; the optimizer does not exist yet.

        Raises:
            BadInput: More blocks than there are, or a network without any that can be removed.
        """
        self.check_weights(wanted.by)
        self.__dict__["whole"] = deepcopy(self.net)
        testing = list(testing)
        before = error(self.net, testing)
        try:
            scores = depth_scores(self.net, scoring, by=wanted.by)
            self.report = prune_depth_(self.net, **wanted.target, scores=scores, batches=scoring)
        except ValueError as failure:
            raise BadInput(str(failure)) from failure
        removed = list(self.report.removed)
        after = error(self.net, testing)
        self.cut = Cut(removed, len(scores), before, after, dict(scores), list(scores.order), scores.seconds)
        self._forget_removed()

    def cut_again_(self, cut: dict[str, Any], example: Tensor) -> None:
        """Remove what a run removed that is to be resumed; its weights come from the checkpoint."""
        self.__dict__["whole"] = deepcopy(self.net)
        self.cut = Cut(**cut)
        batches = [(example, torch.zeros(len(example), dtype=torch.int64))]  # the norms come from the checkpoint too
        self.report = prune_depth_(self.net, remove=self.cut.removed, batches=batches)
        self._forget_removed()

    def _forget_removed(self) -> None:
        live = {id(p) for p in self.net.parameters()}
        groups = [{**g, "params": [p for p in g["params"] if id(p) in live]} for g in self._groups]
        self._groups = [g for g in groups if g["params"]]
        self._learning = [p for p in self._learning if id(p) in live]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.cut is not None:
            checkpoint["cut"] = asdict(self.cut)


@torch.no_grad()
def error(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Error in percent, in ``eval()``; the mode is put back."""
    modes = [(m, m.training) for m in net.modules()]
    net.eval()
    wrong = count = 0
    for images, labels in batches:
        wrong += int((net(images).argmax(1) != labels).sum())
        count += len(labels)
    for module, training in modes:
        module.training = training
    return 100 * wrong / count
