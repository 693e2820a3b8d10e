"""The LightningModule of the fine-tuning recipe: a timm backbone, plain or mean-field, on new classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.optim import Optimizer

from recipes.errors import BadInput
from recipes.finetune.model import Backbone, classifiers, layer_groups, load_weights_
from recipes.images.classifier import Classifier, check
from torch_meanfield import conversion_report, convert, param_groups


class FinetuneTask(Classifier):
    """Fine-tune a timm model to classify images, its residual blocks with learnable times unless told otherwise.

    Two phases. For ``head_epochs`` only the classifier learns, at a constant rate, and the backbone is in ``eval()``.
    Then everything learns: the rate rises linearly over the first ``warmup`` of the remaining steps and falls to 0 as
    half a cosine, and each layer's is ``layer_decay`` times that of the next one. tau has a group of its own without
    weight decay.

    Logged in each epoch: ``train_loss``, ``train_error``, ``val_loss``, ``val_error``, and by `test` ``test_loss``,
    ``test_error``; errors are in percent.

    Args:
        name: Name of a timm model.
        pretrained: Load the weights its authors published (from the hub, or from timm's cache).
        checkpoint: Load a plain state dict from this file instead. A classifier of another number of classes is left
            out.
        new_head: Leave the checkpoint's classifier out whatever its size: same number, other classes.
        kwargs: Further arguments of ``timm.create_model``.
        mean_field: false for the plain model.
        head_epochs: Epochs in which only the classifier learns.
        head_lr: Learning rate in these; null for ``lr``.
        optimizer: adamw, or sgd with momentum.
        lr: Learning rate of the classifier after the warm-up.
        layer_decay: Learning rate of a layer over that of the next one.
        tau_lr_scale: Learning rate of tau over ``lr``.
        weight_decay: Weight decay of matrices and kernels; vectors and tau have none.
        momentum: Momentum of sgd.
        warmup: Share of the steps of the second phase in which the rate rises.
        label_smoothing: Share of the target spread over all classes.
        channels_last: Memory format of weights and images; faster for convolutions.
        birth_death: Wrap the optimizer, so that hidden units and blocks that do harm or have died are replaced.
        birth_death_every: Optimizer steps between two such events.
        num_classes: Taken from the data set on the command line.
        in_chans: Channels of the images; taken from the data set on the command line.
        side: Side of the images in pixels; taken from the data set on the command line.

    Attributes:
        net: The timm model.
        told: What was done with the weights, in words.
        born: Units replaced so far.

    Raises:
        BadInput: An unknown model, an unusable checkpoint, or a number out of its range.
        ValueError: No block of the model can be converted.
    """

    def __init__(
        self,
        name: str = "convnext_atto",
        pretrained: bool = False,
        checkpoint: str | None = None,
        new_head: bool = False,
        kwargs: dict[str, Any] | None = None,
        mean_field: bool = True,
        head_epochs: int = 1,
        head_lr: float | None = None,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        lr: float = 1e-3,
        layer_decay: float = 0.75,
        tau_lr_scale: float = 1.0,
        weight_decay: float = 0.05,
        momentum: float = 0.9,
        warmup: float = 0.1,
        label_smoothing: float = 0.0,
        channels_last: bool = False,
        birth_death: bool = False,
        birth_death_every: int = 200,
        num_classes: int = 10,
        in_chans: int = 3,
        side: int = 224,
    ) -> None:
        super().__init__(
            label_smoothing=label_smoothing,
            channels_last=channels_last,
            birth_death=birth_death,
            birth_death_every=birth_death_every,
            momentum=momentum,
        )
        if pretrained and checkpoint is not None:
            raise BadInput(f"--pretrained and --checkpoint {checkpoint} are two sources of weights; pass one of them")
        check("layer_decay", layer_decay, 0.0 < layer_decay <= 1.0, "a number above 0 and at most 1")
        check("warmup", warmup, 0.0 <= warmup < 1.0, "a share of the steps, 0 to below 1")
        check("head_epochs", head_epochs, head_epochs >= 0, "0 or more")
        rates = {"lr": lr, "weight_decay": weight_decay, "tau_lr_scale": tau_lr_scale}
        rates |= {} if head_lr is None else {"head_lr": head_lr}
        for argument, value in rates.items():
            least = lr > 0 if argument == "lr" else value >= 0
            check(argument, value, math.isfinite(value) and least, "a finite number, at least 0 (lr: above 0)")
        self.backbone = Backbone(name, num_classes, in_chans, side, dict(kwargs or {}))
        self.net = self.backbone.create(pretrained)
        self.told = f"weights of {name} as published" if pretrained else "random weights: training from scratch"
        if checkpoint is not None:
            self.told = load_weights_(self.net, Path(checkpoint), new_head)
        elif pretrained:
            self.told += "; its classifier is new if the number of classes differs"
        self._heads = tuple(classifiers(self.net))
        self._groups = layer_groups(self.net, lr, weight_decay, layer_decay)
        if mean_field:
            convert(self.net, self.backbone.example())
            self._groups += [g for g in param_groups(self.net, lr, 0.0, tau_lr_scale) if g["name"] == "tau"]
        # Some models hold parameters that never learn, such as fixed position embeddings.
        self._learning = [p for p in self.net.parameters() if p.requires_grad]
        self.lay_out_()
        self.head_epochs, self.head_factor = head_epochs, (lr if head_lr is None else head_lr) / lr
        self.optimizer, self.warmup = optimizer, warmup

    def on_train_epoch_start(self) -> None:
        """Choose the phase. Frozen parameters have no gradients, so the backbone costs a forward pass alone."""
        if not self._heads_first:
            return
        everything = self.current_epoch >= self.head_epochs
        heads = [self.net.get_submodule(name) for name in self._heads]
        chosen = {id(p) for head in heads for p in head.parameters()}
        for p in self._learning:
            p.requires_grad_(everything or id(p) in chosen)
        self.net.train(everything)
        for head in heads:
            head.train()
        if self._wrapper is not None:
            self._wrapper.enabled = everything

    @property
    def _heads_first(self) -> bool:
        return self.head_epochs > 0 and not getattr(self.trainer, "fast_dev_run", False)

    def configure_optimizers(self) -> dict[str, Any]:
        self._check_phases()
        total = self.steps_in_all("falls as a cosine to the end of the training")
        each = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        head = self.head_epochs * each if self._heads_first else 0
        if head >= total:
            raise BadInput(
                f"--model.head_epochs {self.head_epochs} leaves none of the {total} steps for the whole model; "
                f"pass fewer, or a larger --trainer.max_epochs"
            )
        groups = [dict(group) for group in self._groups]
        optimizer: Optimizer
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, momentum=self.momentum)
        else:
            optimizer = torch.optim.AdamW(groups)
        optimizer = self.wrapped(optimizer, self.backbone.example)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate(total, head, self.head_factor, self.warmup))
        return self.by_steps(optimizer, schedule)

    def configure_model(self) -> None:
        """Nothing to configure; a strategy that would divide the model is refused."""
        if self.trainer.world_size > 1 and not isinstance(self.trainer.strategy, DDPStrategy):
            raise BadInput(
                "--trainer.strategy: on several devices this recipe needs ddp, since the model is folded at "
                "the end on one of them"
            )

    def _check_phases(self) -> None:
        strategy = self.trainer.strategy
        if not isinstance(strategy, DDPStrategy):
            return
        if self._heads_first and not strategy._ddp_kwargs.get("find_unused_parameters"):
            raise BadInput(
                f"--model.head_epochs {self.head_epochs} on several devices needs --trainer.strategy "
                f"ddp_find_unused_parameters_true: what is frozen has no gradients to exchange; or pass 0"
            )

    def steps(self) -> dict[str, list[float]]:
        """Step sizes of the converted stages by name, in the order of execution; empty for a plain model."""
        try:
            report = conversion_report(self.net)
        except ValueError:
            return {}
        return {s.name: s.module.steps().tolist() for s in report if s.module is not None}


def rate(total: int, head: int, head_factor: float, warmup: float) -> Callable[[int], float]:
    """The factor of all learning rates at each step.

    Args:
        total: Optimizer steps of the training.
        head: Number of these in the first phase, with the constant ``head_factor``.
        warmup: Share of the remaining steps in which the factor rises linearly to 1, before half a cosine to 0.
    """
    rest = total - head
    rising = round(warmup * rest)

    def factor(step: int) -> float:
        if step < head:
            return head_factor
        now = step - head
        if now < rising:
            return (now + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (now - rising) / (rest - rising))))

    return factor
