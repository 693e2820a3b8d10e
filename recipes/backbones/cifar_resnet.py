"""The post-activation CIFAR ResNet of arXiv:1512.03385, with the weights of ``akamaster/pytorch_resnet_cifar10``."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.errors import BadInput, one_line

FILES = {20: "resnet20-12fca82f.th", 32: "resnet32-d509ac18.th", 56: "resnet56-4bfd9763.th"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3x3 convolutions; the shortcut has no parameters: every second pixel, new channels zero (option A)."""

    def __init__(self, in_chans: int, chans: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, chans, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(chans)
        self.conv2 = nn.Conv2d(chans, chans, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(chans)
        self.stride, self.new = stride, chans - in_chans
        self.shortcut: nn.Conv2d | None = None  # of with_convolutions

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.new or self.stride != 1:
            half = self.new // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.new - half))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels; the state dict has the names of the public files.

    Args:
        blocks: Blocks of each stage, the opening one included.
        num_classes: Size of the output.

    Shape:
        input ``(B, 3, H, W)``, output ``(B, num_classes)``.

    Example:
        >>> CifarResNet((3, 3, 3))(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, blocks: tuple[int, int, int], num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        before = 16
        for stage, (count, chans) in enumerate(zip(blocks, (16, 32, 64), strict=True), 1):
            strides = (1 if stage == 1 else 2, *[1] * (count - 1))
            made = [Block(before if i == 0 else chans, chans, stride) for i, stride in enumerate(strides)]
            self.add_module(f"layer{stage}", nn.Sequential(*made))
            before = chans
        self.linear = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        return cast(Tensor, self.linear(x.mean(dim=(2, 3))))


@torch.no_grad()
def with_convolutions(model: nn.Module) -> nn.Module:
    """A copy that computes the same, with 1x1 convolutions of ones and zeros for the shortcuts that change the shape.

    A tool that follows channels through a network cannot follow padded ones; these it can cut, on the stream too.

    Example:
        >>> model, x = CifarResNet((1, 1, 1)).eval(), torch.randn(2, 3, 8, 8)
        >>> torch.equal(with_convolutions(model)(x), model(x))
        True
    """
    copy = deepcopy(model)
    for block in (m for m in copy.modules() if isinstance(m, Block) and (m.new or m.stride != 1)):
        before = block.conv1.in_channels
        shortcut = nn.Conv2d(before, before + block.new, 1, block.stride, bias=False).to(block.conv1.weight)
        nn.init.zeros_(shortcut.weight)
        places = torch.arange(before)
        shortcut.weight[block.new // 2 + places, places] = 1
        block.shortcut = shortcut
    return copy


def public_resnet(depth: int, folder: Path) -> CifarResNet:
    """ResNet-20, -32 or -56 with its public weights.

    Args:
        depth: 20, 32 or 56.
        folder: Holds the public files, named as in :data:`FILES`.

    Raises:
        BadInput: Another depth, or the file is missing, unreadable or of another network.
    """
    if depth not in FILES:
        raise BadInput(f"depth {depth}: public weights are known for {', '.join(map(str, FILES))}")
    path = folder / FILES[depth]
    if not path.is_file():
        raise BadInput(
            f"{path}: there is no such file; it is in pretrained_models/ of akamaster/pytorch_resnet_cifar10"
        )
    blocks = (depth - 2) // 6
    model = CifarResNet((blocks, blocks, blocks))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    except Exception as error:  # torch.load fails in as many ways as a file can be damaged
        raise BadInput(
            f"{path}: not the public ResNet-{depth} ({type(error).__name__}: {one_line(error)[:120]})"
        ) from error
    return model
