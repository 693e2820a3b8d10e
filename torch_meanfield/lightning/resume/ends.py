"""Checkpoints written at the end of an epoch, before all of it is over.

Lightning resumes from one that was written after the last batch as if validation and the last hooks of the epoch had
been. Here its counters are set so that they come.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

WITHIN = "within an epoch"
LAST = "after the last batch of an epoch, before validation"
VALIDATED = "after the last validation of an epoch, before its last hooks"
BETWEEN = "between two epochs"


def place(trainer: Trainer) -> str:
    """Where in the epoch the training is: one of the constants above."""
    loop = trainer.fit_loop
    batches: Any = loop.epoch_loop.batch_progress
    epochs: Any = loop.epoch_progress.current
    if epochs.processed == epochs.ready:
        return BETWEEN
    if not batches.is_last_batch:
        return WITHIN
    return LAST if batches.current.completed < batches.current.processed else VALIDATED


def finish(loops: dict[str, Any]) -> None:
    """Edit what a checkpoint says of the fit loop: the last batch is done, and validation was interrupted at once."""
    batches = loops["epoch_loop.batch_progress"]
    for count in (batches["total"], batches["current"]):
        count["completed"] = count["processed"]
    validation = loops["epoch_loop.val_loop.batch_progress"]
    done = validation["total"]["completed"]
    validation["total"] |= {"ready": done + 1, "started": done + 1, "processed": done}
    validation["current"] |= dict.fromkeys(("ready", "started", "processed", "completed"), 0)
    validation["is_last_batch"] = False


def begin_anew(trainer: Trainer) -> None:
    """Let the next epoch be an ordinary one: an epoch without anything left does not say itself that it was resumed."""
    trainer.fit_loop.epoch_loop.restarting = False
