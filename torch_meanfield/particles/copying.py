"""Copying in place: whole values in and out of tensors that may be sharded, and large ones piece by piece."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

PIECE = 2**20  # bytes


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a ``DTensor``. Does not import ``torch.distributed`` where nothing else has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether ``a`` begins where ``b`` does, so that writing one writes the other; asked of plain tensors only."""
    plain = all(type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided for t in (a, b))
    return plain and a.device == b.device and a.data_ptr() == b.data_ptr() != 0


def whole(tensor: Tensor) -> Tensor:
    """The detached value of ``tensor``, gathered from all ranks if it is sharded."""
    tensor = tensor.detach()
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_sharded(tensor) else tensor


def write_(tensor: Tensor, value: Tensor) -> None:
    """Copy the whole ``value`` into ``tensor`` in place; a sharded tensor takes its own part.

    Every rank has the same ``value`` and cuts its own part out of it: nothing is sent.
    """
    tensor = tensor.detach()
    if is_sharded(tensor):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = cast(Any, tensor).device_mesh
        replicas = DTensor.from_local(value.to(tensor.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
        value = replicas.redistribute(placements=cast(Any, tensor).placements)
    tensor.copy_(value)


def pieces(tensor: Tensor, dim: int) -> Sequence[Tensor]:
    """Views that make up ``tensor``, each whole along ``dim``, small enough to be copied by way of little memory.

    What moves is copied twice, out and back. In pieces that fit the processor's cache that takes less than half of the
    time (2.5 times faster for 46 MiB), and a big tensor needs no second one of its size, there or on a GPU.
    """
    limit = PIECE if tensor.device.type == "cpu" else 64 * PIECE
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes <= limit:
        return [tensor]
    across = max((d for d in range(tensor.ndim) if d != dim), key=lambda d: tensor.shape[d])
    return tensor.chunk(-(-nbytes // limit), across)
