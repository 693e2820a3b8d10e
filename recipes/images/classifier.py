"""What the LightningModules of the recipes share: a step of training and of evaluation, and births around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from recipes.errors import BadInput
from recipes.images.sharded import FoundPopulations
from torch_meanfield import BirthDeathOptimizer
from torch_meanfield.width import Event

Batch = tuple[Tensor, Tensor]
APART = "birth_death"  # where a checkpoint of a sharded run keeps what its optimizer state has no room for


class Classifier(LightningModule):
    """Base of the tasks that train a network ``net`` to classify images, by a schedule that ends with the training.

    Logged in each epoch: ``train_loss``, ``train_error``, ``val_loss``, ``val_error``, and by `test` ``test_loss``,
    ``test_error``; errors are in percent.

    Args:
        label_smoothing: Share of the target spread over all classes, in training.
        channels_last: Memory format of weights (:meth:`lay_out_`) and images.
        momentum: Momentum of SGD.
        birth_death: Whether :meth:`wrapped` lets units and blocks die and be born.
        birth_death_every: Optimizer steps between two such events.

    Attributes:
        net: The network; set by the subclass.
        born: Units and blocks replaced so far.

    Raises:
        BadInput: A number out of its range.
    """

    net: nn.Module

    def __init__(
        self,
        *,
        label_smoothing: float,
        channels_last: bool,
        birth_death: bool,
        birth_death_every: int,
        momentum: float,
    ) -> None:
        super().__init__()
        check("label_smoothing", label_smoothing, 0.0 <= label_smoothing < 1.0, "a number from 0 to below 1")
        check("momentum", momentum, 0.0 <= momentum < 1.0, "a number from 0 to below 1")
        check("birth_death_every", birth_death_every, birth_death_every >= 1, "1 or more")
        self.label_smoothing, self.channels_last, self.momentum = label_smoothing, channels_last, momentum
        self.birth_death_every = birth_death_every if birth_death else None
        self.born = 0
        self._wrapper: BirthDeathOptimizer | None = None
        self._found: FoundPopulations | None = None  # the populations of a network that is sharded

    def lay_out_(self) -> None:
        """Give the weights of ``net`` their memory format; call it when they exist."""
        if self.channels_last:
            self.net.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape ``(B, num_classes)`` for normalised images of shape ``(B, in_chans, H, W)``."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.net(images)

    def _step(self, images: Tensor, targets: Tensor, split: str) -> Tensor:
        """The loss, logged with the error; targets are classes ``(B,)`` or their probabilities ``(B, num_classes)``."""
        logits = self(images)
        smoothing = self.label_smoothing if split == "train" else 0.0
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        error = (logits.detach().argmax(1) != labels).float().mean() * 100
        self.log_dict(
            {f"{split}_loss": loss.detach(), f"{split}_error": error},
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            batch_size=len(labels),
            sync_dist=True,
        )
        return loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._step(*batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._step(*batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._step(*batch, "test")

    def steps_in_all(self, schedule: str) -> int:
        """Optimizer steps of the whole training, which ``schedule`` is told in.

        Raises:
            BadInput: The training has no end.
        """
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise BadInput(f"the learning rate {schedule}: say when the training ends, with --trainer.max_epochs")
        return int(total)

    @staticmethod
    def by_steps(optimizer: Optimizer, schedule: LRScheduler) -> dict[str, Any]:
        """What ``configure_optimizers`` returns for a schedule that counts optimizer steps, not epochs."""
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def wrapped(self, optimizer: Optimizer, example: Callable[[], Tensor]) -> Optimizer:
        """``optimizer``, or if asked for a :class:`BirthDeathOptimizer` around it that knows its populations already.

        Known from the start (from an ``example()`` input), they resume bit for bit.
        """
        if self.birth_death_every is None:
            return optimizer
        batch = self._compiled_batch()  # a compiled network shows neither its samples nor where the loss is steep
        options: dict[str, Any] = {"every": self.birth_death_every, "batch_size": batch, "steep": batch is None}
        if self._found is None:
            options["example_input"] = example().to(self.device)
        else:
            options["populations"] = self._found.within(self.net)
        self._wrapper = BirthDeathOptimizer(optimizer, self.net, **options)
        self._wrapper.register_event_hook(self._count)
        return self._wrapper

    def _compiled_batch(self) -> int | None:
        """Images behind a step of a compiled network, whose layers do not show them to the optimizer's counter."""
        each: int | None = getattr(self.trainer.datamodule, "batch_size", None)
        if self.net._compiled_call_impl is None or each is None:
            return None
        return each * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def _count(self, event: Event) -> None:
        self.born += len(event.born)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["born"] = self.born
        if self._found is not None and self._wrapper is not None:
            # The tools that gather a sharded optimizer's state take what torch's own optimizers have.
            checkpoint[APART] = self._wrapper.birth_death_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.born = checkpoint.get("born", 0)
        if self._found is not None and self._wrapper is not None and APART in checkpoint:
            self._wrapper.load_birth_death_state(checkpoint[APART])


def check(argument: str, value: Any, fits: bool, wanted: str) -> None:
    """Raise :class:`BadInput` unless the model's ``argument`` ``fits``."""
    if not fits:
        raise BadInput(f"--model.{argument} {value}: pass {wanted}")
