"""The settings of the benchmarks: a network, how its inputs are scaled, and the optimizer that is wrapped or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from recipes.plasticity.backbone import Backbone
from recipes.plasticity.network import ConvNet, Mlp, Network
from recipes.plasticity.transformer import VisionTransformer

OPTIMIZERS = {"adam": Adam, "adamw": AdamW, "sgd": SGD}


@dataclass(frozen=True)
class Setting:
    """A network, its inputs and its optimizer.

    Attributes:
        standardised: inputs by the mean and deviation of all pixels of all images.
        norm: a layer norm before each activation of an MLP.
        widths: of an MLP's hidden layers; the first is that of a ConvNet.
        kind: ``"mlp"``, ``"convolutions"``, ``"transformer"``, or the name of a timm backbone.
        normalised: each input by its own running mean and deviation, see :class:`RunningNorm`.
        weights: state dict that a timm backbone begins from.
    """

    name: str
    standardised: bool = False
    norm: bool = False
    activation: str = "relu"
    optimizer: str = "adam"
    lr: float = 1e-3
    widths: Sequence[int] = (64, 64)
    kind: str = "mlp"
    normalised: bool = False
    weights: Path | None = None

    def model(self, inputs: int, outputs: int) -> Network | Backbone:
        """A network of that many numbers in and out."""
        if self.kind == "mlp":
            return Mlp(inputs, outputs, self.widths, self.activation, self.norm)
        if self.kind == "convolutions":
            return ConvNet(outputs, self.widths[0])
        if self.kind == "transformer":
            return VisionTransformer(inputs, outputs, self.activation)
        return Backbone(outputs, self.kind, self.weights)

    def bare(self, model: nn.Module) -> Optimizer:
        """The optimizer at its step size, all else as torch has it."""
        return OPTIMIZERS[self.optimizer](model.parameters(), lr=self.lr)


SETTINGS = {
    s.name: s
    for s in (
        Setting("pixels"),
        Setting("standardised", standardised=True),
        Setting("layer norm", norm=True),
        Setting("SGD", optimizer="sgd", lr=0.1),
        Setting("SGD, normalised", optimizer="sgd", lr=0.1, normalised=True),
        Setting("GELU", activation="gelu"),
        Setting("tanh", activation="tanh"),
        Setting("ConvNet", widths=(32,), kind="convolutions"),
        Setting("ViT", activation="gelu", kind="transformer"),
        Setting("ViT, ReLU", kind="transformer"),
        Setting("8 units", widths=(8, 8)),
        Setting("64 units"),
        Setting("resnet18", kind="resnet18"),
        Setting("DQN"),
        Setting("online AdamW", optimizer="adamw", lr=1e-4, widths=(300, 150)),
        Setting("online SGD, normalised", optimizer="sgd", lr=0.003, widths=(300, 150), normalised=True),
    )
}


class RunningNorm:
    """Inputs by their running mean and deviation, each by its own: an average over about ``window`` samples.

    A sample counts before it is used, so that the first one becomes 0.
    """

    def __init__(self, inputs: int, window: int = 1000) -> None:
        self.decay, self.steps = 1 / window, 0
        self.mean, self.square = torch.zeros(inputs), torch.zeros(inputs)

    @torch.no_grad()
    def __call__(self, x: Tensor, watch: bool = True) -> Tensor:
        """Of ``x``, ``(B, d)``; ``watch``: these count."""
        if watch:
            for mean, now in ((self.mean, x.mean(0)), (self.square, x.square().mean(0))):
                share = max(1 / (self.steps + 1), min(1.0, len(x) * self.decay))
                mean.lerp_(now, share)
            self.steps += 1
        spread = (self.square - self.mean.square()).clamp_min(0).sqrt()
        return (x - self.mean) / (spread + 1e-2)
