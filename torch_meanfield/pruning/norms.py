"""Batch norms after a removal: their statistics are those of the deeper network."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from torch_meanfield._torch import is_batch_norm
from torch_meanfield.observe import run, undisturbed
from torch_meanfield.pruning.batches import Batch


class _Called(nn.Module):
    """``model`` on inputs of any kind."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Any:
        """Run it."""
        return run(self.model, inputs)


def reestimate_norms_(model: nn.Module, batches: Sequence[Batch], undo: ExitStack) -> int:
    """Let the batch norms of ``model`` that keep running statistics have those of ``batches``; returns how many do.

    Norms that the model does not run (of a teacher or an average that it holds) keep theirs.
    """
    norms = [m for m in model.modules() if is_batch_norm(type(m)) and getattr(m, "running_mean", None) is not None]
    if not norms:
        return 0
    kept = {norm: [(t, t.clone()) for t in norm.buffers(recurse=False)] for norm in norms}
    for norm in norms:
        undo.callback(setattr, norm, "momentum", getattr(norm, "momentum", None))
        undo.callback(_put, kept[norm])
    modes = [(m, m.training) for m in model.modules()]
    try:
        with undisturbed():
            update_bn([(batch.inputs,) for batch in batches], _Called(model))
    finally:
        for module, training in modes:
            module.training = training
    idle = [norm for norm in norms if not int(cast(Tensor, norm.num_batches_tracked))]  # of another forward pass
    for norm in idle:
        _put(kept[norm])
    return len(norms) - len(idle)


def _put(kept: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, value in kept:
            tensor.copy_(value)
