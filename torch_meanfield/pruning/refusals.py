"""Who holds a model in a way that does not survive that its blocks become fewer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torch_meanfield._torch import compiled_modules, is_compiled
from torch_meanfield.particles.copying import is_sharded
from torch_meanfield.particles.holders import living

_AFTER = "prune first, and wrap or compile what is left"
_WRAPPERS = {
    "DistributedDataParallel": "DDP keeps buckets of its parameters",
    "FullyShardedDataParallel": "FSDP keeps flat shards of its parameters",
}


def check_free(model: nn.Module) -> None:
    """Raise if ``model`` is wrapped, compiled, sharded or captured.

    Raises:
        ValueError: it is; what holds it is named.
    """
    for name, module in model.named_modules():
        _check_wrapper(module, f"prune_depth_: {name or 'model'} is")
        if is_compiled(module):
            raise ValueError(
                f"prune_depth_: {name or type(module).__name__} was compiled by .compile(), whose graph holds the "
                f"blocks; {_AFTER}"
            )
        forward: Any = module.__dict__.get("forward")
        if getattr(forward, "__module__", "") == "torch.cuda.graphs":
            raise ValueError(
                f"prune_depth_: {name or type(module).__name__} replays CUDA graphs "
                f"(make_graphed_callables), which hold the blocks; {_AFTER}"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_sharded(tensor):
            raise ValueError(f"prune_depth_: {name} is sharded (FSDP2, fully_shard); {_AFTER}")
    inside = {id(m) for m in model.modules()}
    for holder in living(_holding_kinds()):
        if id(holder) not in inside and any(id(m) in inside for m in _modules(holder)):
            _check_wrapper(holder, f"prune_depth_: model ({type(model).__name__}) is inside")


def _holding_kinds() -> list[type]:
    return [nn.parallel.DistributedDataParallel, *compiled_modules()]


def _modules(holder: Any) -> list[nn.Module]:
    try:
        return list(holder.modules())
    except (AttributeError, RecursionError):  # one that is still being made
        return []


def _check_wrapper(module: nn.Module, what: str) -> None:
    kinds = [kind.__name__ for kind in type(module).__mro__]
    for kind, reason in _WRAPPERS.items():
        if kind in kinds:
            raise ValueError(f"{what} a {kind}: {reason}; {_AFTER}")
    if any(isinstance(module, kind) for kind in compiled_modules()):
        raise ValueError(f"{what} compiled (torch.compile): its graph holds the blocks; {_AFTER}")


def captured_graphs() -> bool:
    """Whether any CUDA graph is alive in this process, of this model or another."""
    cuda: Any = torch.cuda
    kind = getattr(cuda, "CUDAGraph", None)
    return kind is not None and cuda.is_initialized() and bool(living([kind]))
