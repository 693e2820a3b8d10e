"""What data-parallel ranks tell each other at an event, so that all of them do the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """This process's rank and the number of ranks; ``(0, 1)`` where nothing is distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def of_all_ranks(value: Any) -> list[Any]:
    """``value`` of every rank, in the order of the ranks; all must call it."""
    ranks = world()[1]
    if ranks == 1:
        return [value]
    out: list[Any] = [None] * ranks
    dist.all_gather_object(out, value)
    return out


def of_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` holds on one of the ranks; all must call it. One number on ``device``, no objects."""
    if world()[1] == 1:
        return flag
    number = torch.tensor([int(flag)], device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return bool(number.item())


def rows_of_all_ranks(rows: Tensor) -> Tensor:
    """The rows of all ranks, one rank's behind the other's, however many each has; all must call it."""
    ranks = world()[1]
    if ranks == 1:
        return rows
    sizes = of_all_ranks(len(rows))
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    out = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(out, padded)
    return torch.cat([part[:size] for part, size in zip(out, sizes, strict=True)])


def check_alike(facts: Mapping[str, Any]) -> None:
    """Raise on every rank if one of ``facts`` differs between ranks: their models would part from here on.

    Raises:
        RuntimeError: naming the fact, two ranks and what it is there.
    """
    if world()[1] == 1:
        return
    first, *others = of_all_ranks({name: repr(value) for name, value in facts.items()})
    for rank, theirs in enumerate(others, start=1):
        for name, value in first.items():
            if theirs[name] != value:
                raise RuntimeError(
                    f"BirthDeathOptimizer: {name} differs between data-parallel ranks, which would replace different "
                    f"units: {value[:200]} on rank 0, {theirs[name][:200]} on rank {rank}. Seed all ranks alike before "
                    f"the model is made, or make the optimizer after DistributedDataParallel(model), which sends rank "
                    f"0's parameters to all; give it the same arguments on all ranks"
                )
