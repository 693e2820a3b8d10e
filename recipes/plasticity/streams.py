"""Streams of tasks: of still images, labels drawn anew or pixels permuted anew at every task, or of flipping bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from recipes.images.source import Images
from recipes.plasticity.bits import walk

SIDE = 14  # pixels to which images are averaged


@dataclass(frozen=True)
class Task:
    """What is learned until the next one begins.

    Attributes:
        x: inputs, ``(n, d)``.
        y: classes, int64 ``(n,)``, or numbers, ``(n, 1)``.
        epochs: how often they are seen.
        asked: inputs and classes by which it is scored at its end; ``None``: each batch, before it is trained on.
    """

    x: Tensor
    y: Tensor
    epochs: int
    asked: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Stream:
    """A benchmark.

    Args:
        kind: ``"labels"``: the same images under labels drawn anew at every task, learned for many epochs; the score
            of a task is the training accuracy at its end. ``"permuted"``: other images at every task, their pixels
            permuted anew, seen once; the score is the accuracy before each step. ``"stationary"``: no change, a task is
            one epoch over the same images; the score is the accuracy on 10,000 others. ``"regression"``: see
            :mod:`.bits`; the score is the share of the variance that is explained before each step. ``"classes"``: two
            more classes at every task, with those before; ``samples`` of each, the score is the accuracy on 1,000
            others of these classes. ``"cartpole"``: no images, see :mod:`.dqn`; ``samples`` are steps.
        tasks: how many.
        samples: images in a task.
        epochs: in a task.
        last: over how many tasks at the end the score is averaged.
        batch: images in a step.
        side: pixels to which images are averaged.
    """

    kind: str
    tasks: int
    samples: int
    epochs: int
    last: int
    batch: int = 16
    side: int = SIDE

    def walk(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Iterator[Task]:
        """The tasks, drawn from the images ``x`` (``(N, d)``) of classes ``y``."""
        if self.kind == "regression":
            yield from (Task(bits, out, self.epochs) for bits, out in walk(self.tasks, self.samples, generator))
            return
        if self.kind == "classes":
            yield from self._growing(x, y, generator)
            return
        classes, d = int(y.max()) + 1, x.shape[1]
        order = torch.randperm(len(x), generator=generator)
        chosen, others = order[: self.samples], order[self.samples :][:10_000]
        for _ in range(self.tasks):
            if self.kind == "labels":
                labels = torch.randint(classes, (len(chosen),), generator=generator)
                yield Task(x[chosen], labels, self.epochs, (x[chosen], labels))
                continue
            if self.kind == "stationary":
                yield Task(x[chosen], y[chosen], self.epochs, (x[others], y[others]))
                continue
            places = torch.randperm(d, generator=generator)
            chosen = torch.randperm(len(x), generator=generator)[: self.samples]
            yield Task(x[chosen][:, places], y[chosen], self.epochs)

    def _growing(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Iterator[Task]:
        order = torch.randperm(len(x), generator=generator)
        kinds = torch.randperm(int(y.max()) + 1, generator=generator)
        for task in range(min(self.tasks, (len(kinds) + 1) // 2)):
            arrived = kinds[: 2 * task + 2]
            of_each = [order[y[order] == kind] for kind in arrived]
            chosen = torch.cat([places[: self.samples] for places in of_each])
            others = torch.cat([places[self.samples :][: 1000 // len(arrived)] for places in of_each])
            yield Task(x[chosen], y[chosen], self.epochs, (x[others], y[others]))


STREAMS = {
    "labels": Stream("labels", tasks=40, samples=640, epochs=30, last=8),
    "permuted": Stream("permuted", tasks=60, samples=4800, epochs=1, last=20),
    "stationary": Stream("stationary", tasks=15, samples=12_000, epochs=1, last=1),
    "convolutions": Stream("labels", tasks=20, samples=640, epochs=30, last=5),
    "protocol": Stream("permuted", tasks=20, samples=5000, epochs=1, last=20, batch=1, side=28),
    "cartpole": Stream("cartpole", tasks=10, samples=4000, epochs=1, last=5, batch=32),
    "incremental": Stream("classes", tasks=5, samples=100, epochs=5, last=1),
    "regression": Stream("regression", tasks=200, samples=1600, epochs=1, last=50),
}


def inputs(images: Images, standardised: bool, side: int = SIDE) -> Tensor:
    """Pixels in [0, 1] averaged to ``side`` x ``side``, one row an image.

    ``standardised``: by the mean and deviation of all.
    """
    x = images.pixels.float() / 255
    x = F.adaptive_avg_pool2d(x, min(side, x.shape[-1])).flatten(1)
    return (x - x.mean()) / x.std() if standardised else x
