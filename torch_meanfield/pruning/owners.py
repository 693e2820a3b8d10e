"""The optimizers and schedulers that train a model, and what they lose with its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torch_meanfield.particles.holders import living
from torch_meanfield.particles.optimizer_state import known_optimizers
from torch_meanfield.particles.shortening import forget_

# What schedulers keep for each group of parameters.
_BY_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "base_momentums", "max_momentums", "max_lrs")


def optimizers_of(model: nn.Module, given: Any) -> list[Optimizer]:
    """Every optimizer that holds a parameter of ``model``, those that are given first.

    Raises:
        TypeError: one that is none. ValueError: one that holds nothing of the model, or that has populations.
    """
    given = [given] if isinstance(given, Optimizer) else list(given)
    mine = {id(p) for p in model.parameters()}
    for optimizer in given:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"prune_depth_: optimizers must be torch.optim.Optimizer objects, got {type(optimizer).__name__}"
            )
        if not any(id(p) in mine for p in _parameters(optimizer)):
            raise ValueError(
                f"prune_depth_: optimizers holds a {type(optimizer).__name__} without any parameter of the model; pass "
                f"the one that trains it"
            )
    others = [o for o in living([Optimizer]) if any(id(p) in mine for p in _parameters(o))]
    for optimizer in (*given, *others):
        if any(kind.__name__ == "BirthDeathOptimizer" for kind in type(optimizer).__mro__):
            raise ValueError(
                "prune_depth_: the model is trained by a BirthDeathOptimizer, whose populations and their averages are "
                "those of the blocks there are; prune first, and wrap the optimizer then"
            )
    return [o for o in known_optimizers([*given, *others]) if any(id(p) in mine for p in _parameters(o))]


def _parameters(optimizer: Any) -> list[Any]:
    groups = getattr(optimizer, "param_groups", None) or ()
    return [p for group in groups for p in group["params"]]


def schedulers_of(optimizers: Sequence[Optimizer], given: Any) -> list[Any]:
    """Every scheduler of ``optimizers``, those that are given first.

    Raises:
        TypeError: one that drives no optimizer. ValueError: one that drives another.
    """
    given = [given] if hasattr(given, "optimizer") else list(given)
    mine = {id(o) for o in optimizers}
    for scheduler in given:
        if not isinstance(getattr(scheduler, "optimizer", None), Optimizer):
            raise TypeError(f"prune_depth_: schedulers must be of torch.optim, got {type(scheduler).__name__}")
        if id(scheduler.optimizer) not in mine and not _shares(scheduler.optimizer, optimizers):
            raise ValueError(
                f"prune_depth_: schedulers holds a {type(scheduler).__name__} of an optimizer that does not train this "
                f"model"
            )
    found = [s for s in living([LRScheduler]) if _shares(getattr(s, "optimizer", None), optimizers)]
    return list({id(s): s for s in (*given, *found)}.values())


def _shares(optimizer: Any, optimizers: Sequence[Optimizer]) -> bool:
    groups = getattr(optimizer, "param_groups", None)
    return groups is not None and any(o.param_groups is groups for o in optimizers)


def let_go_(optimizer: Optimizer, gone: Sequence[Tensor], schedulers: Sequence[Any], undo: ExitStack) -> bool:
    """Take ``gone`` out of ``optimizer``, with groups that hold nothing else; whether it held any.

    A network that is built with fewer blocks makes no groups for those it has not, so that a checkpoint of the
    optimizer fits it. The other groups stay as they are, with ``initial_lr`` and all that a scheduler wrote there.
    """
    before = [len(group["params"]) for group in optimizer.param_groups]
    forget_(optimizer, gone, undo)
    after = [len(group["params"]) for group in optimizer.param_groups]
    empty = [i for i, (was, now) in enumerate(zip(before, after, strict=True)) if was and not now]
    if empty:
        _drop(optimizer.param_groups, empty, undo)
        for scheduler in schedulers:
            if scheduler.optimizer is optimizer or scheduler.optimizer.param_groups is optimizer.param_groups:
                for key in _BY_GROUP:
                    kept = getattr(scheduler, key, None)
                    if isinstance(kept, list) and len(kept) == len(before):
                        _drop(kept, empty, undo)
    return before != after


def _drop(items: list[Any], places: Sequence[int], undo: ExitStack) -> None:
    undo.callback(items.__setitem__, slice(None), list(items))
    items[:] = [item for i, item in enumerate(items) if i not in places]
