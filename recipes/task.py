"""The LightningModule of the recipes: MeanFieldResNet under the training protocol of L20 section 5."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor

from recipes.errors import BadInput
from torch_meanfield import MeanFieldResNet, param_groups


class ImageTask(LightningModule):
    """Train a mean-field ResNet, or its vanilla twin, to classify images.

    SGD with momentum 0.9; the learning rate is divided by 10 after 50 % and after 75 % of the steps (epochs 80 and
    120 of 160). Logged in each epoch: ``train_loss``, ``train_error``, ``val_loss``, ``val_error``, and by `test`
    ``test_loss``, ``test_error``; errors are in percent. What ``val_`` stands for is the data module's choice: the test
    images, in the published protocol.

    Nothing here re-sorts: the model's layers do that after every optimizer step by themselves.

    Args:
        depth: 6k + 2 for basic blocks, 9k + 2 for bottleneck and resnext.
        block: kind of residual branch.
        cardinality: groups of a ResNeXt block.
        base_width: channels in a group of a ResNeXt block.
        horizon: last time of the uniform grid in each stage; null for the number of its blocks (all steps are 1).
        tau_init: where the times start: uniform (a grid) or random.
        learn_tau: false for the vanilla twin with the same initial weights.
        drop_rate: dropout before the classifier.
        lr: learning rate at the start.
        momentum: of SGD.
        weight_decay: of the weights; tau has none.
        tau_lr_scale: learning rate of tau over that of the weights.
        num_classes: taken from the data set on the command line.
        in_chans: channels of the images; taken from the data set on the command line.

    Raises:
        ValueError: a depth that the block type does not have, or a number out of its range.
    """

    def __init__(
        self,
        depth: int = 20,
        block: Literal["basic", "bottleneck", "resnext"] = "basic",
        cardinality: int = 8,
        base_width: int = 64,
        horizon: float | None = None,
        tau_init: Literal["uniform", "random"] = "uniform",
        learn_tau: bool = True,
        drop_rate: float = 0.0,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        tau_lr_scale: float = 1.0,
        num_classes: int = 10,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.net = MeanFieldResNet(
            depth,
            num_classes,
            in_chans,
            block,
            cardinality=cardinality,
            base_width=base_width,
            horizon=horizon,
            tau_init=tau_init,
            learn_tau=learn_tau,
            drop_rate=drop_rate,
        )
        if not 0.0 <= momentum < 1.0:
            raise BadInput(f"--model.momentum {momentum}: pass a number from 0 to below 1")
        self.groups = {"lr": lr, "weight_decay": weight_decay, "tau_lr_scale": tau_lr_scale}
        param_groups(self.net, **self.groups)  # rates out of range are refused here, and not at the first step
        self.momentum = momentum

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape ``(B, num_classes)`` for normalised images of shape ``(B, in_chans, H, W)``."""
        return self.net(images)

    def _step(self, batch: tuple[Tensor, Tensor], split: str) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        error = (logits.detach().argmax(1) != labels).float().mean() * 100
        self.log_dict(
            {f"{split}_loss": loss.detach(), f"{split}_error": error},
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            batch_size=len(labels),
            sync_dist=split != "train",
        )
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step(batch, "test")

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(param_groups(self.net, **self.groups), momentum=self.momentum)
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise BadInput("the learning rate falls at 50 % and 75 % of the training: end it, --trainer.max_epochs")
        # In steps, so that a schedule of 5 epochs has the same shape as one of 160: the drops may fall inside an epoch.
        milestones = [max(1, round(total * share)) for share in (0.5, 0.75)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
