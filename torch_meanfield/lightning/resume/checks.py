"""Which checkpoints can be resumed exactly, and by which training."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import Trainer

VERSION = 1
WAY_OUT = "or resume without ExactResume, under other random numbers"


def between_steps(trainer: Trainer) -> str:
    """Where between two optimizer steps the training is, in words, with a warning; empty if it is after one."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    within = ""
    if progress.current.ready != progress.current.processed:
        within = "in the middle of a training step"
    elif not progress.is_last_batch and progress.current.ready % trainer.accumulate_grad_batches:
        within = "between two batches whose gradients are accumulated"
    if within:
        warnings.warn(
            f"ExactResume: this checkpoint is written {within}, and cannot be resumed exactly; write checkpoints "
            f"after optimizer steps (every_n_train_steps, or at the end of an epoch)",
            stacklevel=3,
        )
    return within


def part_of_rank(state: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
    """What this rank has in the callback's ``state`` of a checkpoint.

    Raises:
        ValueError: ``trainer`` cannot resume exactly from it; the way out is named.
    """
    if state["version"] != VERSION:
        raise ValueError(
            f"ExactResume: the checkpoint has version {state['version']!r} of its state, this library reads "
            f"{VERSION}; resume with the torch-meanfield it was written by, {WAY_OUT}"
        )
    if state["world_size"] != trainer.world_size:
        raise ValueError(
            f"ExactResume: the checkpoint was written by {state['world_size']} processes, this training has "
            f"{trainer.world_size}; resume with {state['world_size']}, {WAY_OUT}"
        )
    part: dict[str, Any] = state["ranks"][trainer.global_rank]
    device = trainer.strategy.root_device.type
    if part["device"] != device:
        raise ValueError(
            f"ExactResume: the checkpoint was written on {part['device']}, this training is on {device}; resume on "
            f"{part['device']}, {WAY_OUT}"
        )
    if part["within"]:
        raise ValueError(
            f"ExactResume: the checkpoint was written {part['within']}; resume from one that was written after an "
            f"optimizer step, {WAY_OUT}"
        )
    return part
