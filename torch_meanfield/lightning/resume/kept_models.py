"""Models that callbacks of the trainer keep beside the one that is trained: averaged copies."""

from __future__ import annotations

from collections.abc import Iterator

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.optim.swa_utils import AveragedModel

from torch_meanfield.lightning.resume.plain_names import name_plainly_
from torch_meanfield.particles.averages import follow, lineage_of


def _kept(trainer: Trainer) -> Iterator[nn.Module]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        yield from (value for value in vars(callback).values() if isinstance(value, nn.Module))


def name_all_plainly_(trainer: Trainer, model: LightningModule) -> None:
    """:func:`.name_plainly_` in the model, and in those that callbacks keep."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        return  # torch.distributed.checkpoint, which names the tensors there, leaves the prefix out itself
    for each in (model, *_kept(trainer)):
        name_plainly_(each)


def pair_averages(trainer: Trainer, model: LightningModule) -> None:
    """Let averages follow births: what they were made from may be unknown in the process that resumes."""
    for kept in _kept(trainer):
        if isinstance(kept, AveragedModel) and type(kept.module) is type(model):
            for module in model.modules():
                lineage_of(module)
            follow(kept.module, model)
