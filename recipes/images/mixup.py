"""Mixup whose draws depend on the seed and the place in the training, and on nothing that a model draws."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor
from torchvision.transforms import v2


class Mixup:
    """torchvision's ``MixUp`` (Zhang et al. 2018), drawn anew for each batch from ``(seed, rank, epoch, batch)``.

    So a vanilla twin mixes the same images in the same proportions, a resumed run goes on as the unbroken one, and no
    generator state has to be kept: of a checkpoint only the ``seed`` is needed.

    Args:
        alpha: Parameter of the Beta distribution of the proportion; above 0.
        num_classes: Length of the mixed targets.
        seed: Where the draws start.
    """

    def __init__(self, alpha: float, num_classes: int, seed: int = 0) -> None:
        self.seed = seed
        self._mix = v2.MixUp(alpha=alpha, num_classes=num_classes)

    def __call__(self, images: Tensor, labels: Tensor, place: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Mix each image with its neighbour in the batch.

        Args:
            images: Floats of shape ``(B, C, H, W)``.
            labels: int64, shape ``(B,)``.
            place: Rank, epoch, and number of the batch in it.

        Returns:
            Mixed images ``(B, C, H, W)``, and the probabilities of the classes ``(B, num_classes)``.
        """
        drawn = numpy.random.SeedSequence([self.seed, *place]).generate_state(1, numpy.uint64)
        # The transform draws from the CPU's global generator: lend it one. (torch.manual_seed would reseed GPUs too.)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(drawn[0] >> numpy.uint64(1)))
            mixed: tuple[Tensor, Tensor] = self._mix(images, labels)
        return mixed
