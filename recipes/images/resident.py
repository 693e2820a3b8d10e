"""Batches of a data set that lies on the device whole: no workers, no transfers, no host work per image."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from recipes.images.augment import cut_windows, normalise
from recipes.images.order import Order
from recipes.images.source import Images

# Of a GPU's free memory, so that the network and what it computes have the rest.
SHARE = 0.5


def fits(nbytes: int, device: torch.device) -> bool:
    """Whether ``nbytes`` of decoded images should be kept on ``device``.

    On the CPU always, since they are in its memory already; on CUDA if they take at most half of what is free now; on
    other devices, which do not tell, never.
    """
    if device.type == "cuda":
        return nbytes <= SHARE * torch.cuda.mem_get_info(device)[0]
    return device.type == "cpu"


class ResidentLoader:
    """Iterate over batches of images that are on the device already, cropped, mirrored and normalised there.

    What an epoch needs of chance (order and crops) is drawn on the CPU when its first batch is asked for, and copied to
    the device once; after that a batch is a handful of operations on the device, and nothing waits for it.

    Args:
        images: Decoded; copied to ``device`` unless they are there.
        batch_size: Images in a batch; the last one of an epoch may be smaller.
        order: Order of the images, and their crops, see :class:`.Order`; it draws an epoch each time iteration begins.
        mean, std: Mean and standard deviation of pixels in 0..1 by channel, shape ``(C,)``.
        device: Where the batches are wanted.

    Yields:
        images float32 ``(B, C, H, W)`` and labels int64 ``(B,)``, both on ``device``.

    Raises:
        ValueError: ``batch_size`` below 1, or an order of another number of images.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        order: Order,
        mean: Tensor,
        std: Tensor,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"ResidentLoader: batch_size must be at least 1, got {batch_size}")
        if order.n != len(images):
            raise ValueError(f"ResidentLoader: order is of {order.n} images, but there are {len(images)}")
        self.device = torch.device(device)
        self.pixels, self.labels = images.pixels.to(self.device), images.labels.to(self.device)
        self.mean, self.std = mean.to(self.device), std.to(self.device)
        self.batch_size, self.order = batch_size, order

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A generator: Lightning makes iterators that it never asks for a batch, and those must draw nothing.
        drawn, windows = self.order.draw()
        order = drawn.to(self.device)
        windows = None if windows is None else windows.to(self.device)
        for start in range(0, len(drawn), self.batch_size):
            index = order[start : start + self.batch_size]
            pixels = self.pixels.index_select(0, index)
            if windows is not None:
                assert self.order.padding is not None
                these = windows[start : start + self.batch_size]
                pixels = cut_windows(pixels, self.order.padding, these, self.order.mirror)
            yield normalise(pixels, self.mean, self.std), self.labels.index_select(0, index)
