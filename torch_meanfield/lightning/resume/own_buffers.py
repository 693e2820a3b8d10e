"""Buffers that each rank keeps for itself: the running statistics of batch norm over the images that it has seen.

DDP sends the first rank's to all, but only in the training's forward pass, and FSDP2 never does. A checkpoint holds the
first rank's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_meanfield.particles.copying import is_sharded


def collect(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of ``module`` by name, on the CPU."""
    return {name: b.detach().cpu().clone() for name, b in module.named_buffers() if not is_sharded(b)}


def drop_common_(ranks: list[dict[str, Any]]) -> None:
    """Keep under ``"buffers"`` of each rank what differs from the first rank's, which the checkpoint holds anyway."""
    first = ranks[0]["buffers"]
    for part in ranks:
        part["buffers"] = {name: b for name, b in part["buffers"].items() if not _same(b, first.get(name))}


@torch.no_grad()
def restore_(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Write back the buffers of this rank that :func:`drop_common_` kept."""
    ours = dict(module.named_buffers())
    for name in buffers.keys() & ours.keys():
        ours[name].copy_(buffers[name])


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and bool(torch.equal(a, b))
