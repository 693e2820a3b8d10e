"""The network of the comparison: one stage of blocks of one shape, and the ways to train it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_meanfield import MeanFieldSequential
from torch_meanfield.models.branches import basic_branch

SHORT = 4.0  # the horizon T of the trainings at a short one


@dataclass(frozen=True)
class Way:
    """How a network is trained.

    Attributes:
        name: How tables name it.
        horizon: The last time T at the start; ``None``: the number of blocks, so that every step is 1.
        learn: Whether times are learned.
        shrinks: Whether training begins at twice the horizon, which falls to it in the first half.
        drop: Whether every other batch runs without some blocks, those of the smallest steps: stochastic depth by step.
        penalty: What is added to the loss for each unit of the sum of the steps' square roots.
    """

    name: str
    horizon: float | None = SHORT
    learn: bool = True
    shrinks: bool = False
    drop: bool = False
    penalty: float = 0.0


WAYS = {
    w.name: w
    for w in (
        Way("T = 4, learned"),
        Way("T = 4, fixed", learn=False),
        Way("T = n, learned", horizon=None),
        Way("T = n, fixed", horizon=None, learn=False),
        Way("T = 4, learned, dropped by step", drop=True),
        Way("T = 4, learned, penalty", penalty=1e-2),
        Way("T = 8 to 4, learned", shrinks=True),
    )
}


class Branch(nn.Module):
    """A residual branch that can be passed by: it adds nothing then."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inside = basic_branch(channels, channels)
        self.passed_by = False

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x) if self.passed_by else cast(Tensor, self.inside(x))


class Network(nn.Module):
    """Stem, blocks of one shape on a tau axis, classifier.

    Args:
        in_chans: Channels of the images.
        num_classes: Size of the output.
        blocks: Number of blocks.
        channels: Of each.
        way: Gives horizon, and whether times are learned.

    Shape:
        input ``(B, in_chans, H, W)``, output ``(B, num_classes)``.
    """

    def __init__(self, in_chans: int, num_classes: int, blocks: int, channels: int, way: Way) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)
        horizon = way.horizon if way.horizon is None or not way.shrinks else 2 * way.horizon
        self.blocks = MeanFieldSequential(
            *(Branch(channels) for _ in range(blocks)), horizon=horizon, learn_tau=way.learn
        )
        self.norm = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        return cast(Tensor, self.fc(x.mean(dim=(2, 3))))

    @torch.no_grad()
    def pass_by_(self, count: int) -> None:
        """Let the next passes go without the ``count`` blocks of the smallest steps."""
        small = set(self.blocks.steps().argsort(stable=True)[:count].tolist())
        for i, branch in enumerate(self.blocks):
            cast(Branch, branch).passed_by = i in small

    @torch.no_grad()
    def shrink_(self, factor: float) -> None:
        """Multiply every time by ``factor``, without loss of order."""
        self.blocks.set_tau_(self.blocks.tau * factor)
