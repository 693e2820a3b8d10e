"""Where the images come from: each named data set as ``uint8`` tensors, decoded once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from recipes.errors import BadInput

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Images:
    """Decoded images.

    Attributes:
        pixels: ``uint8``, shape ``(N, C, H, W)``.
        labels: ``int64``, shape ``(N,)``.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor) -> Images:
        """The images at ``index`` (int64, shape ``(M,)``)."""
        return Images(self.pixels[index], self.labels[index])


class Source(ABC):
    """A data set with a training and a test split.

    Attributes:
        name: how results name it.
        num_classes: number of classes.
        in_chans: channels of an image.
        mirror: whether the mirror image of a member of a class is again a member, so that mirroring is allowed.
    """

    name: str
    num_classes: int
    in_chans: int
    mirror: bool

    def download(self) -> None:  # noqa: B027 - most sources have nothing to fetch
        """Fetch what is missing; called in one process only."""

    @abstractmethod
    def decode(self, split: Split) -> Images:
        """All images of a split, decoded."""


class Digits(Source):
    """scikit-learn's ``load_digits``: 1,797 scanned handwritten digits, 8x8 grey, inside the package.

    It has no split of its own: 500 images, balanced over the classes, are the test images, always the same ones.
    """

    name, num_classes, in_chans = "digits", 10, 1
    # A mirrored 2 is no 2: the flip of the published augmentation would train on symbols that never occur.
    mirror = False

    def decode(self, split: Split) -> Images:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        bunch = load_digits()
        chosen = train_test_split(range(len(bunch.target)), test_size=500, random_state=0, stratify=bunch.target)
        index = torch.tensor(sorted(chosen[0 if split == "train" else 1]))
        # Stored as 0..16.
        pixels = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
        return Images(pixels, torch.from_numpy(bunch.target).long()).select(index)


class Torchvision(Source):
    """CIFAR-10, CIFAR-100 or Fashion-MNIST, downloaded by torchvision into ``root`` when they are not there."""

    _classes = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion-mnist": "FashionMNIST"}
    mirror = True

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root = name, root
        self.num_classes = 100 if name == "cifar100" else 10
        self.in_chans = 1 if name == "fashion-mnist" else 3

    def _open(self, split: Split, download: bool) -> Any:
        from torchvision import datasets

        try:
            return getattr(datasets, self._classes[self.name])(self.root, train=split == "train", download=download)
        # URLError and a refused connection are OSErrors; torchvision reports a bad checksum as a RuntimeError.
        except (OSError, RuntimeError, EOFError) as error:
            raise BadInput(
                f"--data {self.name}: it could neither be read from {self.root} nor downloaded to it ({error}); put "
                f"its files there, or pass --data digits, which needs no download"
            ) from error

    def download(self) -> None:
        self._open("train", download=True)
        self._open("test", download=True)

    def decode(self, split: Split) -> Images:
        data = self._open(split, download=False)
        pixels = torch.as_tensor(data.data)  # (N, H, W, 3) for CIFAR, (N, H, W) for Fashion-MNIST
        pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        return Images(pixels.contiguous(), torch.as_tensor(data.targets).long())


NAMES = ("digits", *Torchvision._classes)


def open_source(data: str, root: Path, size: int | None = None) -> Source:
    """The source that ``data`` names.

    Args:
        data: ``digits``, ``fashion-mnist``, ``cifar10``, ``cifar100``, or ``folder:PATH``.
        root: where torchvision keeps what it downloads.
        size: side in pixels to which the images of a folder are resized; ``None`` if they have one size already.

    Raises:
        BadInput: an unknown name, or a folder that cannot be used.
    """
    kind, _, path = data.partition(":")
    if kind == "folder" and path:
        from recipes.folder import Folder

        return Folder(Path(path).expanduser(), size)
    if data == "digits":
        return Digits()
    if data in Torchvision._classes:
        return Torchvision(data, root)
    raise BadInput(f"--data {data!r} is unknown; accepted: {', '.join(NAMES)}, or folder:PATH")
