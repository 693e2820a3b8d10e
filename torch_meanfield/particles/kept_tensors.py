"""Averages that are no modules but lists or dicts of tensors, in the order of ``parameters()`` or by name."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from torch_meanfield.particles.columns import Slice
from torch_meanfield.particles.copying import same_memory
from torch_meanfield.particles.holders import holders_of
from torch_meanfield.particles.population import Column, Population, named_tensors
from torch_meanfield.particles.resampled import Resampled
from torch_meanfield.particles.shortening import cut_


class KeptTensors:
    """One of them.

    Args:
        kept: holds the tensors. As an attribute of an object it is looked up there, since the object may replace it.
        model: what it averages.

    Raises:
        TypeError: its tensors are those of ``model`` itself.
        ValueError: they are not, in number and shape, those of ``model``, or are there for some particles of a
            population only.
    """

    def __init__(self, kept: Sequence[Tensor] | Mapping[Any, Tensor], model: nn.Module) -> None:
        self.keys = _keys_by_name(kept, model)
        holder = next(iter(holders_of([kept], depth=0)), None)
        self._kept: Any = kept
        if holder is not None and type(holder.owner).__weakrefoffset__:
            owner, attribute = weakref.ref(holder.owner), holder.attribute
            self._kept = lambda: getattr(owner(), attribute, None)

    def tensors(self) -> Any:
        """The list or dict as it is now; ``None`` if its owner is gone."""
        return self._kept() if callable(self._kept) else self._kept

    def columns(self, population: Population, model: nn.Module) -> dict[int, Column]:
        """Those of ``population`` that are averaged, laid over the averages, by their number."""
        kept = self.tensors()
        if kept is None:
            return {}
        twins = {id(t): kept[self.keys[n]] for n, t in named_tensors(model).items() if n in self.keys}
        columns = {i: c for i, c in enumerate(population.columns) if id(c.tensors[0]) in twins}
        return {i: c.on([twins[id(t)] for t in c.tensors]) for i, c in columns.items()}

    def shorten_(self, population: Population, model: nn.Module, size: int, undo: ExitStack) -> None:
        """Hold nothing any more for the particles behind the first ``size``."""
        kept, columns = self.tensors(), self.columns(population, model)
        gone = {id(t) for i, c in columns.items() if c.owns_whole for t in population.columns[i].tensors[size:]}
        gone |= {id(t) for i in columns for t in population.columns[i].tensors if not size}
        for column in columns.values():
            if isinstance(column, Slice):
                cut_(column, size, (), undo)
        names = [n for n, t in named_tensors(model).items() if id(t) in gone and n in self.keys]
        if not names:
            return
        undo.callback(self.__dict__.update, keys=self.keys)
        dropped = {self.keys[n] for n in names}
        if isinstance(kept, MutableMapping):
            undo.callback(kept.update, dict(kept))
            undo.callback(kept.clear)
            for key in dropped:
                del kept[key]
            places = {key: key for key in kept}
        else:
            if not isinstance(kept, MutableSequence):
                raise TypeError(
                    f"{population.name}: a {type(kept).__name__} of averaged tensors cannot become shorter; keep them "
                    f"in a list or dict"
                )
            undo.callback(kept.__setitem__, slice(None), list(kept))
            left = [i for i in range(len(kept)) if i not in dropped]
            kept[:] = [kept[i] for i in left]
            places = {old: new for new, old in enumerate(left)}
        self.keys = {n: places[key] for n, key in self.keys.items() if key in places}


def _keys_by_name(kept: Sequence[Tensor] | Mapping[Any, Tensor], model: nn.Module) -> dict[str, Any]:
    """Where in ``kept`` the average of each of the model's tensors is."""
    ours = named_tensors(model)
    keys: list[Any] = list(kept) if isinstance(kept, Mapping) else list(range(len(kept)))
    values: list[Any] = list(kept.values()) if isinstance(kept, Mapping) else list(kept)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    orders = [keys] if {*keys} <= ours.keys() else [[n for n, _ in model.named_parameters()], trained]
    shapes = [v.shape if isinstance(v, Tensor) else None for v in values]
    order = next((names for names in orders if names and [ours[n].shape for n in names] == shapes), None)
    if order is None:
        raise ValueError(
            f"follow: copy holds {len(keys)} values that are not, in number and shape, the {len(orders[0])} tensors of "
            f"model.parameters() in their order; pass those, or a dict of them by their names in model"
        )
    if any(same_memory(value, ours[n]) for n, value in zip(order, values, strict=True)):
        raise TypeError(
            f"follow: copy must be a torch.nn.Module, got {type(kept).__name__} of tensors of model itself; pass those "
            f"of its average"
        )
    averaged = {id(ours[n]) for n in order}
    for module in model.modules():
        for column in module.population().columns if isinstance(module, Resampled) else ():
            if len({id(t) in averaged for t in column.tensors}) > 1:
                raise ValueError(
                    f"follow: copy averages a tensor of some particles of {type(module).__name__} and not of others, "
                    f"with which they change places; average it for all of them"
                )
    return dict(zip(order, keys, strict=True))
