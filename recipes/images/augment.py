"""The augmentation of Lu et al. 2020, section 5 for a whole batch at once on its own device: pad, crop, mirror."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_padding(side: int) -> int:
    """Pixels of padding for images of ``side`` pixels: an eighth of the side, which is the published 4 for 32."""
    return max(1, round(side / 8))


def draw_windows(n: int, padding: int, mirror: bool, generator: torch.Generator | None = None) -> Tensor:
    """Choose a window for each of n images: all (2 padding + 1)^2 of them, and their mirror images, are as likely.

    One number for each image, so that drawing an epoch at once and drawing it batch by batch give the same.

    Args:
        n: Number of images.
        padding: Pixels on each side, at least 0.
        mirror: Whether mirror images are among the choices.
        generator: A CPU generator: drawn on the CPU, one seed gives the same crops on every device. ``None`` for the
            global one.

    Returns:
        int64, shape ``(n,)``, on the CPU: ``(m * (2 padding + 1) + dy) * (2 padding + 1) + dx`` for the window whose
        upper left corner is at row dy and column dx of the padded image, mirrored if m is 1 and not if it is 0.

    Raises:
        ValueError: ``padding`` is negative.
    """
    if padding < 0:
        raise ValueError(f"draw_windows: padding must be at least 0, got {padding}")
    return torch.randint((2 * padding + 1) ** 2 * (1 + mirror), (n,), generator=generator)


def cut_windows(images: Tensor, padding: int, windows: Tensor, mirror: bool = True) -> Tensor:
    """Pad each image with black and cut its window; nothing is drawn and nothing read back from the device.

    A row of a window is contiguous in memory, so one gather of rows does the cropping: 0.15 ms for 128 images of
    3x32x32 on one CPU core, a third of what a gather of pixels takes.

    Args:
        images: Shape ``(N, C, H, W)``, any dtype, on any device.
        padding: Pixels on each side, at least 0.
        windows: int64, shape ``(N,)``, on the device of ``images``; see :func:`draw_windows`.
        mirror: ``False`` if none of ``windows`` is mirrored, which spares looking.

    Returns:
        Shape ``(N, C, H, W)``, the dtype and device of ``images``.

    Raises:
        ValueError: ``images`` is not four-dimensional, or ``windows`` does not hold one number for each of them.
    """
    if images.ndim != 4:
        raise ValueError(f"cut_windows: images must have shape (N, C, H, W), got {tuple(images.shape)}")
    n, c, h, w = images.shape
    if windows.shape != (n,):
        raise ValueError(f"cut_windows: windows must have shape ({n},), got {tuple(windows.shape)}")
    choices = 2 * padding + 1
    padded = F.pad(images, (padding, padding, padding, padding)).contiguous()
    height, width = padded.shape[2:]
    dy, dx = windows.div(choices, rounding_mode="floor") % choices, windows % choices
    device = images.device
    channels = torch.arange(n * c, device=device).view(n, c, 1) * height
    rows = torch.arange(h, device=device) + (channels + dy.view(n, 1, 1))
    starts = rows * width + dx.view(n, 1, 1)
    # Every run of w numbers in memory, by where it starts: they overlap, but nothing is copied yet.
    runs = padded.as_strided((padded.numel() - w + 1, w), (1, 1))
    out = runs.index_select(0, starts.view(-1)).view(n, c, h, w)
    if not mirror:
        return out
    both = torch.stack([out, out.flip(3)]).view(2 * n, -1)
    mirrored = windows.div(choices**2, rounding_mode="floor")
    return both.index_select(0, torch.arange(n, device=device) + n * mirrored).view(n, c, h, w)


def pad_crop_mirror(images: Tensor, padding: int, mirror: bool, generator: torch.Generator | None = None) -> Tensor:
    """Pad each image with black, cut a window of the old size at random, and mirror half of the images.

    The same distribution as torchvision's ``RandomCrop(size, padding)`` and ``RandomHorizontalFlip()``, drawn for
    each image on its own; see :func:`draw_windows` and :func:`cut_windows`.

    Args:
        images: Shape ``(N, C, H, W)``, any dtype, on any device.
        padding: Pixels on each side, at least 0.
        mirror: Whether to mirror left to right with probability 1/2.
        generator: A CPU generator for the draws; ``None`` for the global one.

    Returns:
        Shape ``(N, C, H, W)``, the dtype and device of ``images``.

    Raises:
        ValueError: ``images`` is not four-dimensional or ``padding`` is negative.
    """
    windows = draw_windows(len(images), padding, mirror, generator).to(images.device, non_blocking=True)
    return cut_windows(images, padding, windows, mirror)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """``uint8`` images ``(N, C, H, W)`` as float32, less the channel ``mean`` over ``std``, both of pixels in 0..1."""
    scale = (1.0 / (255.0 * std)).view(-1, 1, 1)
    return images.to(torch.float32).mul_(scale).sub_((mean / std).view(-1, 1, 1))
