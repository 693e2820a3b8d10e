"""Where the images come from: each named data set as ``uint8`` tensors, decoded once."""

from __future__ import annotations

import math
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch

from recipes.errors import BadInput
from recipes.images.saving import NO_ROOM
from recipes.images.source import Images, Source, Split


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
        # URLError and a refused connection are OSErrors; torchvision reports a bad checksum as a RuntimeError; a broken
        # transfer is an HTTPException, a damaged archive a ReadError or a zlib.error.
        except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise
            raise BadInput(
                f"--data {self.name}: it could neither be read from {self.root} nor downloaded to it ({error})"
                f"{self._told(self.delete_damaged())}; put its files there, or pass --data digits, which needs no "
                f"download"
            ) from error

    def download(self) -> None:
        """Fetch what is missing. What an interrupted download left is deleted first, and named."""
        damaged = self.delete_damaged()
        if damaged:
            print(f"--data {self.name}: downloading anew{self._told(damaged)}", file=sys.stderr)
        try:
            self._open("train", download=True)
            self._open("test", download=True)
        except BaseException:  # Ctrl-C too
            self.delete_damaged()
            raise

    @staticmethod
    def _told(damaged: list[Path]) -> str:
        return f"; deleted what was damaged: {', '.join(map(str, damaged))}" if damaged else ""

    def delete_damaged(self) -> list[Path]:
        """Delete archives with a wrong checksum, and unpacked files that are not whole; their paths."""
        from torchvision import datasets
        from torchvision.datasets.utils import check_integrity

        kind = getattr(datasets, self._classes[self.name])
        checks: list[tuple[Path, Callable[[Path], bool]]]
        if self.name == "fashion-mnist":
            raw = self.root / "FashionMNIST" / "raw"
            checks = [(raw / name, partial(check_integrity, md5=md5)) for name, md5 in kind.resources]
            # torchvision unpacks in place, and asks no more than whether a file of the name is there.
            checks += [((raw / name).with_suffix(""), whole_idx) for name, _ in kind.resources]
        else:  # whether unpacked files are damaged torchvision sees itself, and unpacks them again
            checks = [(self.root / kind.filename, partial(check_integrity, md5=kind.tgz_md5))]
        damaged = [path for path, fine in checks if path.is_file() and not fine(path)]
        for path in damaged:
            path.unlink()
        return damaged

    def decode(self, split: Split) -> Images:
        data = self._open(split, download=False)
        pixels = torch.as_tensor(data.data)  # (N, H, W, 3) for CIFAR, (N, H, W) for Fashion-MNIST
        pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        return Images(pixels.contiguous(), torch.as_tensor(data.targets).long())


def whole_idx(path: Path) -> bool:
    """Whether a file in the IDX format of MNIST is as long as its header says: 4 bytes, the sizes, then the bytes."""
    with path.open("rb") as file:
        head = file.read(4)
        if len(head) < 4:
            return False
        sizes = struct.unpack(f">{head[3]}I", file.read(4 * head[3]).ljust(4 * head[3], b"\0"))
    return path.stat().st_size == 4 + 4 * head[3] + math.prod(sizes)


NAMES = ("digits", *Torchvision._classes)


def open_source(data: str, root: Path, size: int | None = None) -> Source:
    """The source that ``data`` names.

    Args:
        data: ``digits``, ``fashion-mnist``, ``cifar10``, ``cifar100``, or ``folder:PATH``.
        root: Where torchvision keeps what it downloads.
        size: Side in pixels to which the images of a folder are resized; ``None`` if they have one size already.

    Raises:
        BadInput: An unknown name, or a folder that cannot be used.
    """
    kind, _, path = data.partition(":")
    if kind == "folder" and path:
        from recipes.images.folder import Folder

        return Folder(Path(path).expanduser(), size)
    if data == "digits":
        return Digits()
    if data in Torchvision._classes:
        return Torchvision(data, root)
    raise BadInput(f"--data {data!r} is unknown; accepted: {', '.join(NAMES)}, or folder:PATH")
