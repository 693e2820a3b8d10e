"""The order of the images in each epoch, the crop of each, and which process has which: drawn from one number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from recipes.images.augment import draw_windows


class Order(DistributedSampler[Any]):
    """Permutations of n images, a new one for each epoch; under several processes, this one's share of each.

    An epoch draws one number from ``generator``, which is alike in all processes, and everything else from that
    number: the permutation, the same in all processes, and the crops, other ones in each. So the state of
    ``generator`` between two epochs is all that a checkpoint needs, and an epoch that is begun again is the same.

    It is a ``DistributedSampler`` so that Lightning leaves it in its place: the shares are dealt here as there, image
    ``rank`` first and then every ``world_size``-th, the first images once more if the division leaves a rest. As the
    sampler of a ``DataLoader`` it yields numbers of images, or pairs of such a number and a window if there are crops.

    Args:
        n: Number of images.
        generator: On the CPU; ``None`` for the images as they lie, without any draw.
        shuffle: Whether to permute.
        padding: Pixels of padding for the random crops; ``None`` for neither crops nor mirror images.
        mirror: Whether to mirror half of the images.
        rank: Rank of this process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        n: int,
        generator: torch.Generator | None = None,
        shuffle: bool = True,
        padding: int | None = None,
        mirror: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(range(n), num_replicas=world_size, rank=rank, shuffle=shuffle)  # type: ignore[arg-type]
        self.n, self.generator, self.padding, self.mirror = n, generator, padding, mirror

    def draw(self) -> tuple[Tensor, Tensor | None]:
        """Begin an epoch.

        Returns:
            The numbers of its images, int64, shape ``(len(self),)``, and their windows, of the same shape, see
            :func:`.draw_windows`; ``None`` if there are no crops.
        """
        order, windows = torch.arange(self.n), None
        if self.generator is not None:
            number = int(torch.randint(2**62, (1,), generator=self.generator))
            if self.shuffle:
                order = torch.randperm(self.n, generator=torch.Generator().manual_seed(number))
            if self.padding is not None:
                own = torch.Generator().manual_seed(number + 1 + self.rank)
                windows = draw_windows(len(self), self.padding, self.mirror, own)
        # Over and over from the front where there are fewer images than processes, as DistributedSampler does.
        whole = order.repeat(-(-self.total_size // self.n))[: self.total_size]
        return whole[self.rank :: self.num_replicas], windows

    def __iter__(self) -> Iterator[Any]:
        order, windows = self.draw()
        yield from order.tolist() if windows is None else zip(order.tolist(), windows.tolist(), strict=True)
