"""The LightningDataModule of the recipes: any source, in memory when it fits, augmented as in Lu et al. 2020."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2

from recipes.errors import BadInput
from recipes.images.augment import crop_padding, cut_windows, normalise
from recipes.images.folder import Folder
from recipes.images.order import Order
from recipes.images.resident import ResidentLoader, fits
from recipes.images.source import Images
from recipes.images.sources import open_source

Batch = tuple[Tensor, Tensor]

# Statistics of a folder that is streamed come from this many of its training images, evenly spaced over the classes.
SAMPLE = 2000


class InMemory(Dataset[Any]):
    """Decoded images behind a ``DataLoader``: a whole batch is one indexing, not 128 calls and a collation."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, index: list[Any]) -> tuple[Tensor, ...]:
        """Pixels and labels; of an :class:`.Order` with crops, which gives pairs, the windows to cut as well."""
        numbers, *windows = torch.tensor(index).view(len(index), -1).unbind(1)
        batch = self.images.select(numbers)
        return batch.pixels, batch.labels, *windows


def as_it_is(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The collation of :class:`InMemory`, whose batches are whole already."""
    return batch


def channel_statistics(pixels: Iterable[Tensor], channels: int) -> Batch:
    """Mean and standard deviation of each channel, of pixels in 0..1; shapes ``(C,)``.

    Args:
        pixels: ``uint8`` tensors of shape ``(N, C, H, W)``. Counting the 256 levels is exact and needs no float copy.
        channels: C.
    """
    counts = torch.zeros(channels, 256, dtype=torch.float64)
    for chunk in pixels:
        for c in range(channels):
            counts[c] += torch.bincount(chunk[:, c].flatten(), minlength=256)
    share = counts / counts.sum(1, keepdim=True)
    level = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ level
    variance = share @ level.square() - mean.square()
    # A channel that never changes would be divided by 0.
    return mean.float(), variance.clamp_min(255.0**-2).sqrt().float()


class ImageData(LightningDataModule):
    """Images for training and evaluation, under the published protocol unless told otherwise.

    Under that protocol no validation images are held back: what `fit` evaluates after every epoch are the *test*
    images, as in the paper's curves. Take the last epoch, not the best one, as the result then; or set
    ``val_fraction``.

    Images that fit into memory are decoded once into one ``uint8`` tensor. Where that fits on the trainer's device, it
    is kept there, and a :class:`.ResidentLoader` makes crops and mirror images from it batch by batch; else batches
    come through a ``DataLoader`` and are cropped when they have arrived, with the same draws. A folder that does not
    fit into memory is read by ``ImageFolder`` in DataLoader workers, with torchvision's transforms of the same
    distribution.

    The order of the images and the crops follow the seed and nothing else (a model that draws more or fewer random
    numbers sees the same batches), and both continue where they stopped when a checkpoint of the end of an epoch
    is resumed. Several processes share one order, each with crops of its own.

    Args:
        name: Digits, fashion-mnist, cifar10, cifar100, or folder:PATH (PATH/train/CLASS/*, PATH/test/CLASS/*).
        root: Where torchvision keeps what it downloads.
        batch_size: Images in a training batch.
        eval_batch_size: Images in a batch of evaluation.
        augment: Whether to crop and mirror the training images.
        padding: Pixels of padding for the random crop; null for an eighth of the side (4 for 32 pixels).
        mirror: Whether to mirror; null for what suits the data set (not digits: a mirrored 2 is no 2).
        val_fraction: Share of the training images held back, by the seed, for the evaluation after each epoch.
        size: Side in pixels to which the images of a folder are resized; null if they have one size.
        memory_limit_gib: The most memory that decoded images may take, in GiB; a larger folder is streamed.
        workers: DataLoader workers; null for 0 in memory and up to 4 for a streamed folder.
        resident: Whether the decoded images are kept on the trainer's device; null if they fit there (on a GPU: into
            half of its free memory).
        label: How results name the data set; null for its name.

    Raises:
        BadInput: An unknown name, an unusable folder, or a number out of its range.
    """

    def __init__(
        self,
        name: str = "digits",
        root: str = "data",
        batch_size: int = 128,
        eval_batch_size: int = 500,
        augment: bool = True,
        padding: int | None = None,
        mirror: bool | None = None,
        val_fraction: float = 0.0,
        size: int | None = None,
        memory_limit_gib: float = 2.0,
        workers: int | None = None,
        label: str | None = None,
        resident: bool | None = None,
    ) -> None:
        super().__init__()
        for argument, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise BadInput(f"--data.{argument} {value}: a batch holds at least one image")
        for argument, value in (("padding", padding), ("workers", workers)):
            if value is not None and value < 0:
                raise BadInput(f"--data.{argument} {value} is negative; pass 0 or more, or null for the default")
        if not 0.0 <= val_fraction < 1.0:
            raise BadInput(f"--data.val_fraction {val_fraction}: pass a share of the training images, 0 to below 1")
        self.source = open_source(name, Path(root), size)
        self.num_classes = self.source.num_classes
        self.in_chans = self.source.in_chans
        self.label = label or self.source.name
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.augment, self.padding = augment, padding
        self.mirror = self.source.mirror if mirror is None else mirror
        self.val_fraction = val_fraction
        self.memory_limit = memory_limit_gib * 2**30
        self.workers, self.resident = workers, resident
        self._generator = torch.Generator()
        self._on_device: tuple[torch.device, dict[str, Images]] | None = None
        self._seeded = False
        self._data: dict[str, Dataset[Any]] = {}

    def prepare_data(self) -> None:
        self.source.download()

    @property
    def streamed(self) -> bool:
        """Whether the images are too many for memory and are decoded anew in every epoch."""
        return isinstance(self.source, Folder) and self.source.nbytes() > self.memory_limit

    def setup(self, stage: str) -> None:
        self.open()
        if not self._seeded:
            # A checkpoint's state, if there is one, comes after this.
            self._generator.manual_seed(torch.initial_seed())
            self._seeded = True

    def open(self) -> None:
        """Decode the images, or get ready to stream them; once.

        Raises:
            BadInput: An image that cannot be read or does not fit the others.
        """
        if self._data:
            return
        self._stream = self.streamed
        if self._stream and self.resident:
            raise BadInput(
                f"--data.resident true: the images are too many for memory and are streamed; raise "
                f"--data.memory_limit_gib ({self.memory_limit / 2**30:g}), or pass --data.resident null"
            )
        if self._stream:
            assert isinstance(self.source, Folder)
            side = self.source.side()
            crops: list[Any] = [v2.RandomCrop(side, padding=self._padding(side))] if self.augment else []
            crops += [v2.RandomHorizontalFlip()] if self.augment and self.mirror else []
            train: Any = self.source.stream("train", v2.Compose(crops) if crops else v2.Identity())
            plain: Any = self.source.stream("train", v2.Identity())
            test: Any = self.source.stream("test", v2.Identity())
            some = range(0, len(plain), max(1, len(plain) // SAMPLE))
            self._mean, self._std = channel_statistics((plain[i][0][None] for i in some), self.in_chans)
        else:
            train = plain = InMemory(self.source.decode("train"))
            test = InMemory(self.source.decode("test"))
            pixels = train.images.pixels
            self._mean, self._std = channel_statistics(pixels.split(5000), self.in_chans)
            self._pad = self._padding(pixels.shape[-1])
        val = test
        if self.val_fraction:
            # By the seed, and not by the generator of the order: a resumed run must hold back the same images.
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(torch.initial_seed()))
            held = round(self.val_fraction * len(train))
            if not 0 < held < len(train):
                raise BadInput(
                    f"--data.val_fraction {self.val_fraction} of {len(train)} training images leaves one part empty"
                )
            val, train = self._part(plain, order[:held]), self._part(train, order[held:])
        self._data = {"train": train, "val": val, "test": test}

    @staticmethod
    def _part(data: Any, index: Tensor) -> Dataset[Any]:
        if isinstance(data, InMemory):
            return InMemory(data.images.select(index))
        return Subset(data, index.tolist())

    def _padding(self, side: int) -> int:
        return crop_padding(side) if self.padding is None else self.padding

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _resident(self) -> dict[str, Images] | None:
        """The decoded images by part on the trainer's device, or ``None`` if they are not to be kept there."""
        if self._stream or self.resident is False:
            return None
        device = self._device
        if self._on_device is not None and self._on_device[0] == device:
            return self._on_device[1]
        parts = {part: data.images for part, data in self._data.items() if isinstance(data, InMemory)}
        # Without a fraction held back, `val` is `test`: counted and copied once.
        nbytes = sum({id(images): images.pixels.nbytes for images in parts.values()}.values())
        if not fits(nbytes, device):
            if not self.resident:
                return None
            raise BadInput(
                f"--data.resident true: {nbytes / 2**30:.2f} GiB of images are more than half of what is free on "
                f"{device}; pass --data.resident null"
            )
        copies = {id(images): Images(images.pixels.to(device), images.labels.to(device)) for images in parts.values()}
        self._on_device = device, {part: copies[id(images)] for part, images in parts.items()}
        return self._on_device[1]

    def _loader(self, part: str, batch_size: int) -> Iterable[Any]:
        train, resident = part == "train", self._resident()
        data: Any = self._data[part] if resident is None else resident[part]
        shares = (None if self.trainer is None else self.trainer.distributed_sampler_kwargs) or {}
        rank, world_size = shares.get("rank", 0), shares.get("num_replicas", 1)
        # Lightning's overfit_batches is to show the same images in each epoch.
        chance = train and not getattr(self.trainer, "overfit_batches", 0)
        cropped = chance and self.augment and not self._stream
        order = Order(
            len(data),
            self._generator if chance else None,
            chance,
            self._pad if cropped else None,
            self.mirror,
            rank,
            world_size,
        )
        if resident is not None:
            return ResidentLoader(data, batch_size, order, self._mean, self._std, self._device)
        default = min(4, os.cpu_count() or 1) if self._stream else 0
        workers = default if self.workers is None else self.workers
        return DataLoader(
            data,
            batch_size,
            sampler=order if chance else None,
            generator=self._for_workers(rank),
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=None if self._stream else as_it_is,
            pin_memory=self._device.type == "cuda",
        )

    def _for_workers(self, rank: int) -> torch.Generator:
        """What a DataLoader seeds its workers from: unlike in other processes, and no draw from the order's own."""
        ahead = torch.Generator()
        ahead.set_state(self._generator.get_state())
        return torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=ahead)) + 1 + rank)

    def train_dataloader(self) -> Iterable[Any]:
        return self._loader("train", self.batch_size)

    def val_dataloader(self) -> Iterable[Any]:
        return self._loader("val", self.eval_batch_size)

    def test_dataloader(self) -> Iterable[Any]:
        return self._loader("test", self.eval_batch_size)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        pixels, labels, *windows = batch
        if pixels.is_floating_point():  # a ResidentLoader's batch is finished
            return pixels, labels
        if windows:
            pixels = cut_windows(pixels, self._pad, windows[0], self.mirror)
        self._mean, self._std = self._mean.to(pixels.device), self._std.to(pixels.device)
        return normalise(pixels, self._mean, self._std), labels

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._generator.set_state(state_dict["generator"])
