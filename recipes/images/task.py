"""The LightningModule of the recipes: MeanFieldResNet under the training protocol of Lu et al. 2020, section 5."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from recipes.errors import BadInput
from recipes.images.classifier import Batch, Classifier, check
from recipes.images.mixup import Mixup
from recipes.images.sharded import FoundPopulations, shard_
from torch_meanfield import MeanFieldResNet, param_groups


class ImageTask(Classifier):
    """Train a mean-field ResNet, or its vanilla twin, to classify images.

    SGD with momentum 0.9; the learning rate is divided by 10 after 50 % and after 75 % of the steps (epochs 80 and
    120 of 160). Logged in each epoch: ``train_loss``, ``train_error``, ``val_loss``, ``val_error``, and by `test`
    ``test_loss``, ``test_error``; errors are in percent. What ``val_`` stands for is the data module's choice: the test
    images, in the published protocol. With ``mixup``, ``train_error`` counts against the class of the larger share.

    Nothing here re-sorts: the model's layers do that after every optimizer step by themselves.

    Args:
        depth: 6k + 2 for basic blocks, 9k + 2 for bottleneck and resnext.
        block: Kind of residual branch.
        cardinality: Groups of a ResNeXt block.
        base_width: Channels in a group of a ResNeXt block.
        horizon: Last time of the uniform grid in each stage; null for the number of its blocks (all steps are 1).
        tau_init: Where the times start: uniform (a grid) or random.
        learn_tau: false for the vanilla twin with the same initial weights.
        drop_rate: Dropout before the classifier.
        lr: Learning rate at the start.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of the weights; tau has none.
        tau_lr_scale: Learning rate of tau over that of the weights.
        label_smoothing: Share of the target spread over all classes.
        mixup: Alpha of the Beta distribution in which neighbours in a batch are mixed; 0 for none.
        ema: Decay of the exponential moving average of the weights that is evaluated, and kept at the end; null for
            none.
        channels_last: Memory format of weights and images; faster for convolutions on GPUs.
        compile: Run the network through ``torch.compile``.
        birth_death: Wrap the optimizer, so that hidden units and blocks that do harm or have died are replaced.
        birth_death_every: Optimizer steps between two such events.
        num_classes: Taken from the data set on the command line.
        in_chans: Channels of the images; taken from the data set on the command line.

    Attributes:
        net: The network.
        born: Units and blocks replaced so far.

    Raises:
        ValueError: A depth that the block type does not have, or a number out of its range.
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
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        ema: float | None = None,
        channels_last: bool = False,
        compile: bool = False,
        birth_death: bool = False,
        birth_death_every: int = 200,
        num_classes: int = 10,
        in_chans: int = 3,
    ) -> None:
        super().__init__(
            label_smoothing=label_smoothing,
            channels_last=channels_last,
            birth_death=birth_death,
            birth_death_every=birth_death_every,
            momentum=momentum,
        )
        check("mixup", mixup, 0.0 <= mixup < math.inf, "a positive number, or 0 for none")
        check("ema", ema, ema is None or 0.0 < ema < 1.0, "a decay between 0 and 1, or null for none")
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
        self.groups = {"lr": lr, "weight_decay": weight_decay, "tau_lr_scale": tau_lr_scale}
        param_groups(self.net, **self.groups)  # rates out of range are refused here, and not at the first step
        self.lay_out_()
        if compile:
            self.net.compile()  # in place: names in checkpoints stay what they are
        self.mixup = Mixup(mixup, num_classes) if mixup else None
        self.ema = ema

    def configure_callbacks(self) -> list[Callback]:
        """The callback that averages the weights in `fit`; averages of blocks travel with re-sorts by themselves."""
        if self.ema is None or self.trainer.state.fn != TrainerFn.FITTING:
            return []
        return [EMAWeightAveraging(decay=self.ema)]

    def configure_model(self) -> None:
        """Under FSDP2, divide the network over the devices."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            if self.ema is not None:
                raise BadInput(f"--model.ema {self.ema}: averages of a divided model are not kept; pass null, or ddp")
            if self.birth_death_every is not None and self._found is None:
                self._found = FoundPopulations(self.net, self._example())
            shard_(self.net, self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        if self.mixup is not None:
            self.mixup.seed = torch.initial_seed()  # a checkpoint's seed, if there is one, comes after this

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.mixup is not None:
            batch = self.mixup(*batch, (self.global_rank, self.current_epoch, batch_idx))
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> dict[str, Any]:
        total = self.steps_in_all("falls at 50 % and 75 % of the training")
        optimizer = self.wrapped(
            torch.optim.SGD(param_groups(self.net, **self.groups), momentum=self.momentum), self._example
        )
        # In steps, so that a schedule of 5 epochs has the same shape as one of 160: the drops may fall inside an epoch.
        milestones = [max(1, round(total * share)) for share in (0.5, 0.75)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        return self.by_steps(optimizer, schedule)

    def _example(self) -> Tensor:
        """Noise of the shape of an image, always the same; any size goes through this network."""
        return torch.randn(1, self.net.in_chans, 8, 8, generator=torch.Generator().manual_seed(0))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.mixup is not None:
            checkpoint["mixup_seed"] = self.mixup.seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.mixup is not None:
            self.mixup.seed = checkpoint.get("mixup_seed", self.mixup.seed)

    def steps(self) -> dict[str, list[float]]:
        """Step sizes of the layers that learn them, by name and in the order of execution; empty for the twin.

        Under FSDP2 all ranks must call this, since it gathers.
        """
        layers = {name: m for name, m in self.net.mean_field_layers().items() if m.position() is not None}
        taus = {name: layer.tau_axis.read().clamp(min=0).sort().values for name, layer in layers.items()}
        return {name: tau.diff(prepend=tau.new_zeros(1)).tolist() for name, tau in taus.items()}
