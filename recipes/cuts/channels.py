"""The peer: channels cut by ``torch-pruning`` (Fang et al. 2023, arXiv:2301.12900) down to a given latency.

It may cut all that it can follow, the residual stream included, in four ways: groups of channels judged by their L2
norm or by a first-order Taylor expansion of the loss, with one share in every layer or one ranking of the network. Each
way is cut to the latency, its norms are re-estimated, and the one of the least loss on the scoring images is taken.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from recipes.backbones.networks import Network
from recipes.errors import BadInput
from recipes.pruning.story import latencies

WAYS = tuple(f"{by}, {scope}" for by, scope in itertools.product(("norm", "taylor"), ("uniform", "global")))
GRID = 48  # the ratio of channels that go is a multiple of 1 / GRID
MOST = 0.9  # of a layer's channels
Batches = Sequence[tuple[Tensor, Tensor]]


def pruned(model: nn.Module, network: Network, scoring: Batches, way: str, ratio: float) -> nn.Module:
    """A copy of ``model`` without ``ratio`` of its channels, norms re-estimated on ``scoring``.

    Args:
        model: Stays as it is.
        network: Makes the copy one whose channels can be followed.
        scoring: Prepared inputs and labels.
        way: One of :data:`WAYS`.
        ratio: Share of the channels that go.

    Raises:
        BadInput: ``torch-pruning`` is not installed.
    """
    try:
        import torch_pruning as tp
    except ImportError as missing:
        raise BadInput('the arm `channels` needs torch-pruning: pip install "torch-meanfield[peers]"') from missing
    by, scope = way.split(", ")
    copy = network.traceable(model).eval()
    last = [m for m in copy.modules() if isinstance(m, nn.Linear)][-1]  # its outputs are the classes
    importance = tp.importance.GroupMagnitudeImportance(p=2) if by == "norm" else tp.importance.GroupTaylorImportance()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            copy,
            scoring[0][0][:1].contiguous(),
            importance=importance,
            global_pruning=scope == "global",
            pruning_ratio=ratio,
            max_pruning_ratio=MOST,
            ignored_layers=[last],
        )
        if by == "taylor":
            for inputs, labels in scoring:
                F.cross_entropy(copy(inputs), labels).backward()
        pruner.step()
    copy.zero_grad()
    update_bn([(inputs,) for inputs, _ in scoring], _First(copy))
    return copy.to(memory_format=torch.channels_last).eval()


class _First(nn.Module):
    """``model`` on batches as :func:`update_bn` hands them: their first entry."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Any:
        return self.model(batch[0] if isinstance(batch, tuple) else batch)


def ratio_for(model: nn.Module, network: Network, scoring: Batches, way: str, reference: nn.Module) -> float:
    """The least ratio, of those on the grid, at which the copy is not slower than ``reference``, found by bisection."""
    low, high = 0, math.floor(MOST * GRID)
    while high - low > 1:
        middle = (low + high) // 2
        copy = pruned(model, network, scoring, way, middle / GRID)
        ours, theirs = times([copy, reference], scoring[0][0], repeats=5)
        low, high = (low, middle) if ours <= theirs else (middle, high)
    return high / GRID


def candidates(model: nn.Module, network: Network, scoring: Batches, reference: nn.Module) -> list[dict[str, Any]]:
    """Every way at the latency of ``reference``: its ratio, and its loss on the scoring images before fine-tuning."""
    found = []
    for way in WAYS:
        ratio = ratio_for(model, network, scoring, way, reference)
        copy = pruned(model, network, scoring, way, ratio)
        found.append({"way": way, "ratio": ratio, "loss": loss_on(copy, scoring)})
    return found


@torch.no_grad()
def loss_on(model: nn.Module, scoring: Batches) -> float:
    """The mean loss, in the mode that the model is in."""
    total = sum(F.cross_entropy(model(inputs), labels, reduction="sum").item() for inputs, labels in scoring)
    return total / sum(len(labels) for _, labels in scoring)


def times(models: Sequence[nn.Module], inputs: Tensor, repeats: int = 9) -> list[float]:
    """Median milliseconds of processor time of a forward pass in ``eval()``, the models taking turns."""
    modes = [m.training for m in models]
    try:
        return latencies([m.eval() for m in models], inputs[:64], repeats, time.process_time)
    finally:
        for model, training in zip(models, modes, strict=True):
            model.train(training)
