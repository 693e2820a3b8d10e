"""Every motion and birth in a population is published: loggers, averaged copies and other tools follow from here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torch_meanfield.particles.population import Population


@dataclass(frozen=True, eq=False)
class Motion:
    """One motion of one population, published after it has been made.

    Attributes:
        population: which particles moved; ``population.owner`` is the module that holds them.
        index: int64 tensor of shape ``(n,)``; place i now holds what place ``index[i]`` held before.
        cause: ``"resort"`` (after an optimizer step, or by hand), ``"set_tau"``, ``"load"`` (a checkpoint whose tau
            was not sorted), ``"birth_death"``, ``"follow"`` (an averaged copy moved with its source), ``"verify"``
            (a private copy under proof), or what the caller of ``transport_`` named.
        born: int64 ``(k,)``: places that hold newborn particles now, after the index was carried out; ``None`` if none.
        values: what the newborn particles own, by number of the column: what stands in those places now.
    """

    population: Population
    index: Tensor
    cause: str
    born: Tensor | None = None
    values: Mapping[int, Tensor] = field(default_factory=dict)


_subscribers: OrderedDict[int, tuple[Callable[[Motion], None], nn.Module | None]] = OrderedDict()


def subscribe(callback: Callable[[Motion], None], model: nn.Module | None = None) -> RemovableHandle:
    """Call ``callback(motion)`` after every motion, until ``handle.remove()``.

    Args:
        callback: called in the thread that moved the particles, after all of them have moved.
        model: only motions of populations that this module holds; ``None`` for all in the process.

    Returns:
        a handle with ``remove()``; it is also a context manager.

    Raises:
        TypeError: ``callback`` is not callable, or ``model`` is not a module.
    """
    if not callable(callback):
        raise TypeError(f"subscribe: callback must be callable, got {type(callback).__name__}")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"subscribe: model must be a torch.nn.Module or None, got {type(model).__name__}")

    handle = RemovableHandle(_subscribers)
    _subscribers[handle.id] = (callback, model)
    return handle


def is_told(thing: object) -> bool:
    """Whether a method of ``thing`` is a subscriber: it knows of motions, whatever it keeps."""
    return any(getattr(callback, "__self__", None) is thing for callback, _ in list(_subscribers.values()))


def publish(motion: Motion) -> None:
    """Hand ``motion`` to every subscriber."""
    for callback, model in list(_subscribers.values()):
        if model is None or any(m is motion.population.owner for m in model.modules()):
            callback(motion)
