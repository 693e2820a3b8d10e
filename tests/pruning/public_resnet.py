"""The post-activation CIFAR ResNets of He et al. 2015 with shortcuts without parameters, named as the public files are.

The files are those of ``akamaster/pytorch_resnet_cifar10``; tests that need them are skipped where they are absent.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
FILES = {20: "resnet20-12fca82f.th", 32: "resnet32-d509ac18.th", 56: "resnet56-4bfd9763.th"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Shortcut(nn.Module):
    """Every second pixel, and zero channels on both sides."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))


class BasicBlock(nn.Module):
    """relu(shortcut(x) + f(x))."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = Shortcut((out - width) // 2) if stride > 1 else nn.Sequential()

    def forward(self, x):
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        h += self.shortcut(x)
        return F.relu(h)


class PublicResNet(nn.Module):
    """Three stages of ``blocks`` each."""

    def __init__(self, blocks: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        width = 16
        for s, count in enumerate(blocks):
            out = 16 * 2**s
            stage = [BasicBlock(width if i == 0 else out, out, 2 if s and not i else 1) for i in range(count)]
            self.add_module(f"layer{s + 1}", nn.Sequential(*stage))
            width = out
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def public_resnet(depth: int) -> PublicResNet:
    """With the published weights."""
    state = torch.load(DATA / FILES[depth], weights_only=True, map_location="cpu")["state_dict"]
    model = PublicResNet(((depth - 2) // 6,) * 3)
    model.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    return model


def images(start: int, count: int, split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``start`` to ``start + count`` of a fixed random order of cifar10-jpeg, normalised, and their labels."""
    with np.load(DATA / "cifar10_jpeg.npz") as archive:
        data, offsets, labels = (archive[f"{split}_{part}"] for part in ("jpeg", "offsets", "labels"))
    order = np.random.default_rng(0).permutation(len(labels))[start : start + count]
    raw = [Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes())) for i in order]
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in raw])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (pixels - mean) / std, torch.from_numpy(labels[order].astype(np.int64))
