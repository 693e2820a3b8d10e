"""Images in folders: ``PATH/train/CLASS/*`` and ``PATH/test/CLASS/*``, as torchvision's ``ImageFolder`` reads them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from recipes.errors import BadInput
from recipes.images.source import Images, Source, Split


def read_rgb(path: str) -> Image.Image:
    """Open one image as RGB.

    Raises:
        BadInput: The file is not a readable image; it is named.
    """
    try:
        with warnings.catch_warnings():
            # Pillow only warns of 90 to 180 million pixels, and would decode them.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.convert("RGB")
    # Pillow's decoders raise OSError for a truncated file, SyntaxError for a broken PNG, ValueError for some others.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadInput(f"{path} is not a readable image ({type(error).__name__}); replace or remove it") from error


class Folder(Source):
    """Both splits are listed, and checked against each other, when the object is made; decoding comes later.

    Args:
        path: The folder that holds ``train`` and ``test``.
        size: Side in pixels to which every image is resized (a square); ``None`` if all have one size already.

    Raises:
        BadInput: The folder or one of its parts is missing, a class is empty, or the classes of the two splits differ.
    """

    in_chans = 3
    mirror = True

    def __init__(self, path: Path, size: int | None = None) -> None:
        if size is not None and size < 1:
            raise BadInput(f"--data.size {size} is not a size in pixels; pass a positive number")
        if not path.is_dir():
            raise BadInput(f"--data folder:{path}: there is no such folder; pass one that holds train/ and test/")
        missing = [name for name in ("train", "test") if not (path / name).is_dir()]
        if missing:
            raise BadInput(
                f"--data folder:{path}: no {' and no '.join(f'{m}/' for m in missing)} in it; images are expected as "
                f"{path}/train/CLASS/FILE and {path}/test/CLASS/FILE"
            )
        self.name, self.path, self.size = f"folder:{path.name}", path, size
        self._files = {split: self._list(split) for split in ("train", "test")}
        train, test = (set(self._files[split].classes) for split in ("train", "test"))
        if train != test:
            differing = sorted(train ^ test)
            shown = ", ".join(f"{c} only in {'train' if c in train else 'test'}/" for c in differing[:5])
            more = f", and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise BadInput(f"--data folder:{path}: train/ and test/ must hold the same classes; {shown}{more}")
        self.num_classes = len(train)

    def _list(self, split: str) -> ImageFolder:
        try:
            return ImageFolder(str(self.path / split), loader=read_rgb)
        except FileNotFoundError as error:  # no class folder at all, or one without an image
            raise BadInput(f"--data folder:{self.path}: {error}") from error

    def _fit(self, image: Image.Image) -> Image.Image:
        if self.size is None:
            return image
        return image.resize((self.size, self.size), Image.Resampling.BILINEAR)

    def side(self) -> int:
        """Side in pixels of the (square) images: ``size``, or that of the first training image.

        Raises:
            BadInput: The first image is not square and no ``size`` was given.
        """
        path = self._files["train"].samples[0][0]
        image = self._fit(read_rgb(path))
        if image.width != image.height:
            raise BadInput(f"{path} is {image.width}x{image.height} pixels, not square; pass --data.size PIXELS")
        return image.width

    def nbytes(self) -> int:
        """Bytes of both splits, decoded."""
        return sum(len(files) for files in self._files.values()) * 3 * self.side() ** 2

    def decode(self, split: Split) -> Images:
        samples, side = self._files[split].samples, self.side()
        pixels = torch.empty(len(samples), 3, side, side, dtype=torch.uint8)
        # A bar only for what takes seconds.
        bar = tqdm(samples, desc=f"decoding {split}", leave=False, mininterval=1, disable=len(samples) < 2000)
        for i, (path, _) in enumerate(bar):
            pixels[i] = self._load(path, side)
        return Images(pixels, torch.tensor([label for _, label in samples]))

    def _pixels(self, image: Image.Image, path: str, side: int) -> Tensor:
        image = self._fit(image)
        if image.size != (side, side):
            raise BadInput(
                f"{path} is {image.width}x{image.height} pixels, but the first training image is {side}x{side}; pass "
                f"--data.size PIXELS to bring all images to one size"
            )
        return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)

    def stream(self, split: Split, transform: Callable[[Tensor], Any]) -> ImageFolder:
        """The split as a map-style data set of ``(transform(pixels), label)``, decoded anew at every access."""
        return ImageFolder(str(self.path / split), transform=transform, loader=partial(self._load, side=self.side()))

    def _load(self, path: str, side: int) -> Tensor:
        return self._pixels(read_rgb(path), path, side)
