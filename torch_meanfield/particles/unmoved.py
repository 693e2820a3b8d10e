"""Who holds something for each particle that does not move with it: asked once, at the first step, answered by name.

An optimizer that skips ``Optimizer.__init__`` runs no hooks, and an average that is a list of tensors bears no trace of
the model it is of. So the first step of an optimizer looks once at all objects of the process.
"""

from __future__ import annotations

import gc
import types
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_meanfield.particles.averages import adopt_averages, is_followed, lineage_of, recognise
from torch_meanfield.particles.events import is_told
from torch_meanfield.particles.holders import Census, Holder, holders_of
from torch_meanfield.particles.optimizer_state import known_optimizers, remember
from torch_meanfield.particles.population import Population, Slice, Stack

OTHERS = ("torch.", "_pytest.", "lightning.", "pytorch_lightning.")  # what they hold, they do not average unasked


class Asked(NamedTuple):
    """Particles whose belongings are asked for.

    Attributes:
        name: of them, for the warnings.
        owner: the module that holds them.
        parameters: in the order of ``model.parameters()``.
        anywhere: those of which it is not known where they stand in it.
    """

    name: str
    owner: nn.Module | None
    parameters: Sequence[Tensor]
    anywhere: Sequence[Tensor] = ()


def ask(optimizer: Optimizer, particles: Sequence[Asked]) -> None:
    """Let what can move with ``particles`` do so from now on, and warn by name of what cannot.

    Args:
        optimizer: has taken its first step.
        particles: that it trains.
    """
    found = _ask(optimizer, particles)
    if found:
        gc.collect()  # what nobody holds any more says nothing
        found = _ask(optimizer, particles)
    for what, name in found.items():
        warnings.warn(
            f"{what} {name}. They do not move when its particles change places: if they are averages, call "
            f"torch_meanfield.follow(them, model), or they will mix different particles; else nothing is to be done",
            RuntimeWarning,
            stacklevel=2,
        )


def _ask(optimizer: Optimizer, particles: Sequence[Asked]) -> dict[str, str]:
    census = Census()
    _adopt_wrappers(optimizer, census)
    averages = [callback.__dict__.get("_average_model") for callback in census.callbacks]
    for average in (a for a in averages if isinstance(a, nn.Module)):
        recognise(average)
    names: dict[str, str] = {}
    for each in particles:
        if averages and each.owner is not None:
            adopt_averages(each.owner)
        for what in (*_tables(census, each), *_lists(census, each)):
            names.setdefault(f"{what} holds tensors shaped like the parameters of", each.name)
        for what in _frozen_copies(each.owner):
            names.setdefault(f"{what} holds a copy, which no optimizer trains, of", each.name)
    return names


def belongings(population: Population) -> Asked:
    """What to ask for where each particle owns whole tensors."""
    stacks = [c for c in population.columns if isinstance(c, Stack)]
    whole = [c.tensors[i] for i in range(population.size) for c in stacks]
    parts = [c.tensor for c in population.columns if isinstance(c, Slice)]
    mine, shared = ([t for t in tensors if isinstance(t, nn.Parameter)] for tensors in (whole, parts))
    return Asked(population.name, population.owner, mine, shared)


def _adopt_wrappers(optimizer: Optimizer, census: Census) -> None:
    """Optimizers around ``optimizer`` that share its parameters and keep a state of their own (Lookahead, SAM)."""
    known = {id(o.state) for o in known_optimizers([optimizer])}
    groups = optimizer.param_groups
    for other in census.optimizers:
        state = getattr(other, "state", None)
        if state is not None and id(state) not in known and getattr(other, "param_groups", None) is groups:
            remember(other)


def _tables(census: Census, asked: Asked) -> list[str]:
    """Dicts from parameters to tensors that are no optimizer's state."""
    ours = {id(p) for p in asked.parameters}
    states = {id(getattr(o, "state", None)) for o in census.optimizers}
    found = []
    for table in census.by_parameter:
        values = [v for p, v in list(table.items()) if id(p) in ours] if id(table) not in states else []
        if any(isinstance(w, Tensor) and w.ndim for v in values for w in (v.values() if isinstance(v, dict) else [v])):
            found.append(table)
    return _names(holders_of(found, apart_from=[census.by_parameter]))


def _lists(census: Census, asked: Asked) -> list[str]:
    """Lists and dicts of other tensors that have the shapes of the particles' parameters, in their order."""
    mine = (t for p in (*asked.parameters, *asked.anywhere) for t in (p, p.grad) if t is not None)
    places = {_place(t) for t in mine} - {0}
    found = []
    for thing in census.lists:
        values = [v for v in (thing.values() if isinstance(thing, dict) else thing) if issubclass(type(v), Tensor)]
        rest = iter(values)
        if len(values) < len(asked.parameters) + len(asked.anywhere) or any(v.requires_grad for v in values):
            continue  # parameters of another model
        alike = all(any(v.shape == p.shape for v in rest) for p in asked.parameters)
        alike = alike and all(any(v.shape == p.shape for v in values) for p in asked.anywhere)
        if alike and not any(_place(v) in places for v in values) and not is_followed(thing):
            found.append(thing)
    return _names(holders_of(found, apart_from=[census.lists]))


def _names(holders: Iterable[Holder]) -> list[str]:
    named = [h for h in holders if not is_told(h.owner) and _updates(type(h.owner))]
    return [str(h) for h in named if not type(h.owner).__module__.startswith(OTHERS)]


def _updates(kind: type) -> bool:
    """Whether objects of this class can do anything: a record of what was averages nothing."""
    own = (item for k in kind.__mro__ if k is not object for item in vars(k).items())
    return any(isinstance(value, types.FunctionType) and not name.startswith("__") for name, value in own)


def _place(tensor: Tensor) -> int:
    """Where ``tensor`` begins in memory; 0 where it has none that could be asked for."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return tensor.data_ptr() if plain else 0


def _frozen_copies(owner: nn.Module | None) -> list[str]:
    """Deep copies that nobody trains and that follow nothing."""
    copies = list(lineage_of(owner).copies) if owner is not None else []
    modules = [c.module() for c in copies if c.module is not None and not c.following]
    parameters = [(m, list(m.parameters())) for m in modules if m is not None]
    return [_outermost(m) for m, ps in parameters if ps and not any(p.requires_grad for p in ps)]


def _outermost(module: nn.Module) -> str:
    what: Any = module
    name = type(module).__name__
    for _ in range(20):
        holder = next(iter(holders_of([what])), None)
        if holder is None:
            break
        what, name = holder.owner, str(holder)
        if not isinstance(what, nn.Module):
            break
        name = type(what).__name__
    return name
