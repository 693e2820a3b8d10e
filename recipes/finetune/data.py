"""The data of the fine-tuning recipe: any source of the recipes, some of its classes, at the size the model wants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F

from recipes.errors import BadInput
from recipes.images.data import Batch, ImageData, InMemory
from recipes.images.folder import Folder
from recipes.images.source import Images, Source, Split

SIDES = {"digits": 8, "fashion-mnist": 28, "cifar10": 32, "cifar100": 32}


class Chosen(Source):
    """Some classes of a source, numbered anew from 0 in the order given.

    Raises:
        BadInput: Fewer than two classes, one twice, or one that the source does not have.
    """

    def __init__(self, source: Source, classes: list[int]) -> None:
        known = range(source.num_classes)
        if len(classes) < 2 or len(set(classes)) < len(classes) or not set(classes) <= set(known):
            raise BadInput(f"--data.classes {classes}: pass two or more different classes, 0 to {known[-1]}")
        self.name = f"{source.name}-classes-{'-'.join(map(str, classes))}"
        self.num_classes, self.in_chans, self.mirror = len(classes), source.in_chans, source.mirror
        self._source, self._classes = source, classes

    def download(self) -> None:
        self._source.download()

    def decode(self, split: Split) -> Images:
        images = self._source.decode(split)
        number = torch.full((self._source.num_classes,), -1)
        number[self._classes] = torch.arange(len(self._classes))
        labels = number[images.labels]
        return Images(images.pixels[labels >= 0], labels[labels >= 0])


class FinetuneData(ImageData):
    """Images for fine-tuning: :class:`.ImageData` with two more choices.

    Args:
        size: Side in pixels to which images are resized: those of a folder when they are decoded, those of other
            sources batch by batch on the device; null to take them as they are.
        classes: Numbers of the classes to use, in the order of their new numbers (the classes of a folder are sorted
            by name); null for all. The chosen images are held in memory.
        **kwargs: As of :class:`.ImageData`.

    Raises:
        BadInput: As :class:`.ImageData`, or an impossible choice.
    """

    def __init__(self, size: int | None = None, classes: list[int] | None = None, **kwargs: Any) -> None:
        super().__init__(size=size, **kwargs)
        if size is not None and size < 1:
            raise BadInput(f"--size {size} is not a size in pixels; pass a positive number")
        own = self.source.side() if isinstance(self.source, Folder) else SIDES[self.source.name]
        self.side = own if size is None else size
        self._resize = None if self.side == own else self.side
        if classes is not None:
            self.source = Chosen(self.source, classes)
            self.num_classes = self.source.num_classes
            self.label = kwargs.get("label") or self.source.name

    @property
    def statistics(self) -> dict[str, list[float]]:
        """Mean and standard deviation by which the images are normalised, of pixels in 0..1, by channel."""
        return {"mean": self._mean.tolist(), "std": self._std.tolist()}

    def some(self, part: Literal["train", "val", "test"], count: int | None, batch_size: int) -> Iterator[Batch]:
        """Finished batches of ``count`` images of a part (``None``: all), always the same; none in memory is cut."""
        self.prepare_data()
        self.open()
        data: Any = self._data[part]
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count]
        for index in order.split(batch_size):
            if isinstance(data, InMemory):
                chosen = data.images.select(index)
                batch = chosen.pixels, chosen.labels
            else:
                pixels, labels = zip(*(data[int(i)] for i in index), strict=True)
                batch = torch.stack(pixels), torch.tensor(labels)
            yield self.on_after_batch_transfer(batch, 0)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        images, labels = super().on_after_batch_transfer(batch, dataloader_idx)
        if self._resize is not None:
            side = (self._resize, self._resize)
            images = F.interpolate(images, side, mode="bilinear", antialias=True, align_corners=False)
        return images, labels
