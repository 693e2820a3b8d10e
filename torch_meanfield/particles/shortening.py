"""A shorter population: ``new[i] = old[index[i]]`` with fewer places than there were."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_meanfield.particles.columns import Column, Slice
from torch_meanfield.particles.copying import is_sharded
from torch_meanfield.particles.optimizer_state import check_undivided, known_optimizers
from torch_meanfield.particles.population import Population
from torch_meanfield.particles.transport import check_transportable, transport_


def check_shortened(population: Population, index: Sequence[int], optimizers: Iterable[Optimizer] = ()) -> list[int]:
    """``index`` with the particles that go behind it, or the error that :func:`shorten_` would raise.

    Raises:
        ValueError, TypeError: see there.
    """
    n, name = population.size, population.name
    kept = list(index)
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < n for i in kept) or len({*kept}) < len(kept):
        raise ValueError(f"{name}: index must hold different integers in 0..{n - 1}, those of who stays; got {kept}")
    for tensor in (t for c in population.columns for t in c.tensors):
        if is_sharded(tensor):
            raise ValueError(
                f"{name}: a tensor of shape {tuple(tensor.shape)} is sharded (FSDP2), and its shards cannot become "
                f"fewer; shorten the model before fully_shard()"
            )
    order = [*kept, *(i for i in range(n) if i not in {*kept})]
    for optimizer in check_transportable(population, order, optimizers):
        check_undivided(optimizer)
    return order


@torch.no_grad()
def shorten_(
    population: Population,
    index: Sequence[int],
    *,
    optimizers: Iterable[Optimizer] = (),
    cause: str = "prune",
    undo: ExitStack,
) -> list[Tensor]:
    """Let only the particles of ``index`` stay, in its order and in the first places, in place.

    All that moves is moved by :func:`transport_`: those that go stand behind those that stay then, with all that they
    own, in averaged copies too. Of a tensor that holds a slice for each particle the rest is cut off, with that of its
    gradient and its optimizer state: the ``Parameter`` stays the same object and gets new memory. Whole tensors of the
    last places are returned; optimizers forget them by :func:`forget_`, and the modules that hold them are the
    caller's to take out.

    Args:
        population: the particles.
        index: which stay, each once; there may be none.
        optimizers: beside those that have stepped in this process.
        cause: of the motion that is published, which is one of all places.
        undo: takes what undoes this, to be run if something else fails.

    Returns:
        the tensors, each whole, that belong to no particle any more.

    Raises:
        ValueError: an index that is out of range or names a particle twice; a sharded tensor; and as
            :func:`transport_`. TypeError: as :func:`transport_`. Nothing has moved then.
    """
    order = check_shortened(population, index, optimizers)
    back = [order.index(i) for i in range(len(order))]
    transport_(population, order, optimizers=optimizers, cause=cause)
    undo.callback(transport_, population, back, optimizers=optimizers, cause=cause)
    known = known_optimizers(optimizers)
    for column in population.columns:
        if isinstance(column, Slice):
            cut_(column, len(index), known, undo)
    return last_places(population.columns, len(index))


def last_places(columns: Iterable[Column], size: int) -> list[Tensor]:
    """The whole tensors of the particles behind the first ``size``."""
    return [t for c in columns if c.owns_whole for t in c.tensors[size:]]


@torch.no_grad()
def cut_(column: Slice, size: int, optimizers: Iterable[Optimizer], undo: ExitStack) -> None:
    """Cut ``column`` to its first ``size`` particles: values, gradient, and what ``optimizers`` keep for it."""
    tensor = column.tensor

    def shortened(t: Tensor) -> Tensor:
        part = column.by_particle(t.detach()).narrow(column.dim + 1, 0, size)
        return part.reshape(*t.shape[: column.dim], -1 if size else 0, *t.shape[column.dim + 1 :]).clone()

    for optimizer in optimizers:
        state = optimizer.state[tensor] if tensor in optimizer.state else {}
        for key, value in list(state.items()):
            if isinstance(value, Tensor) and value.shape == tensor.shape:
                state[key] = shortened(value)
                undo.callback(state.__setitem__, key, value)
    grad, values = tensor.grad, tensor.data
    undo.callback(_put, tensor, values, grad)
    _put(tensor, shortened(values), None if grad is None else shortened(grad.to_dense() if grad.is_sparse else grad))


def _put(tensor: Tensor, values: Tensor, grad: Tensor | None) -> None:
    tensor.grad = None  # it must have the tensor's shape
    tensor.data = values
    if isinstance(tensor, nn.Parameter):
        tensor.grad = grad


def forget_(optimizer: Optimizer, tensors: Iterable[Tensor], undo: ExitStack) -> None:
    """Let ``optimizer`` train ``tensors`` no more: out of its groups and its state, the order of the others kept.

    The groups stay the same objects, and so does the list of parameters in each; one that trains nothing else is left
    empty.
    """
    gone = {id(t) for t in tensors}
    for group in optimizer.param_groups:
        kept = [i for i, p in enumerate(group["params"]) if id(p) not in gone]
        if len(kept) == len(group["params"]):
            continue
        for key in ("params", "param_names"):  # the names, in groups that have them, are a list beside the parameters
            if key in group:
                undo.callback(group[key].__setitem__, slice(None), list(group[key]))
                group[key][:] = [group[key][i] for i in kept]
    for p in [p for p in optimizer.state if id(p) in gone]:
        undo.callback(optimizer.state.__setitem__, p, optimizer.state[p])
        del optimizer.state[p]
