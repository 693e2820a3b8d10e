"""Writing some places of a population in place: its tensors, their gradients, and what optimizers keep for them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_meanfield.particles.columns import Slice
from torch_meanfield.particles.copying import is_sharded, whole, write_


def places_of(mask: Tensor, count: int) -> Tensor:
    """The ``count`` indices where ``mask`` holds, in order, int64 ``(count,)``, without asking the device how many."""
    n = mask.numel()
    slot = torch.where(mask, mask.cumsum(0) - 1, n)
    out = torch.zeros(n + 1, dtype=torch.int64, device=mask.device)
    return out.scatter_(0, slot, torch.arange(n, device=mask.device))[:count]


def read_rows(column: Slice, places: Tensor) -> Tensor:
    """The entries of the particles at ``places``: the shape of ``by_particle`` with ``len(places)`` for n."""
    return column.by_particle(whole(column.tensor)).index_select(column.dim + 1, places)


def write_rows_(column: Slice, places: Tensor, values: Tensor | float) -> None:
    """Write the particles at ``places``; ``values`` as from :func:`read_rows`, or one number for all."""
    tensor = whole(column.tensor)
    view = column.by_particle(tensor)
    if isinstance(values, Tensor):
        view.index_copy_(column.dim + 1, places, values.to(tensor.dtype))
    else:
        view.index_fill_(column.dim + 1, places, values)
    if is_sharded(column.tensor):  # what was written to is the gathered copy
        write_(column.tensor, tensor)


def scale_rows_(column: Slice, factors: Tensor) -> None:
    """Multiply the entries of particle i by ``factors[i]``, for all n."""
    tensor = whole(column.tensor)
    view = column.by_particle(tensor)
    view.mul_(factors.to(tensor.dtype).view(-1, *[1] * (view.ndim - column.dim - 2)))
    if is_sharded(column.tensor):
        write_(column.tensor, tensor)


def forget_rows_(column: Slice, places: Tensor, optimizers: Iterable[Optimizer]) -> None:
    """Begin anew for the particles at ``places``: gradient 0, and 0 in every state of the parameter's shape."""
    column.change_gradient_(lambda grad: write_rows_(grad, places, 0.0))
    for optimizer in optimizers:
        for kept in column.states(optimizer):
            write_rows_(kept, places, 0.0)
