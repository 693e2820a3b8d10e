"""What a data set of images is: decoded images in memory, and a source that decodes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

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
        index = index.to(self.pixels.device)
        return Images(self.pixels[index], self.labels[index])

    def to(self, device: torch.device | str) -> Images:
        """The images on ``device``."""
        return Images(self.pixels.to(device), self.labels.to(device))


class Source(ABC):
    """A data set with a training and a test split.

    Attributes:
        name: How results name it.
        num_classes: Number of classes.
        in_chans: Channels of an image.
        mirror: Whether the mirror image of a member of a class is again a member, so that mirroring is allowed.
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
