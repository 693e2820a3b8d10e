"""Who holds something for each particle that does not move with it: asked once, at the first step, answered by name.

An optimizer that skips ``Optimizer.__init__`` runs no hooks, and an average that is a list of tensors bears no trace of
the model it is of. So the first step of an optimizer looks once at all objects of the process.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_meanfield.particles.averages import is_followed, lineage_of, recognise
from torch_meanfield.particles.events import is_told
from torch_meanfield.particles.holders import Census, Holder, holder_of
from torch_meanfield.particles.optimizer_state import known_optimizers, remember
from torch_meanfield.particles.population import Population, Slice, Stack


class Asked(NamedTuple):
    """Particles whose belongings are asked for: their parameters in the order of ``model.parameters()``."""

    name: str
    parameters: Sequence[Tensor]
    owner: nn.Module | None


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
    for callback in census.callbacks:
        average = callback.__dict__.get("_average_model")
        if isinstance(average, nn.Module):
            recognise(average)
    names: dict[str, str] = {}
    for each in particles:
        for what in (*_tables(census, each.parameters), *_lists(census, each.parameters)):
            names.setdefault(f"{what} holds tensors shaped like the parameters of", each.name)
        for what in _frozen_copies(each.owner):
            names.setdefault(f"{what} holds a copy, which no optimizer trains, of", each.name)
    return names


def parameters_of(population: Population) -> list[Tensor]:
    """The parameters that particles own whole, particle by particle, and then those that they have parts of."""
    stacks = [c for c in population.columns if isinstance(c, Stack)]
    whole = [c.tensors[i] for i in range(population.size) for c in stacks]
    return [t for t in (*whole, *(c.tensor for c in population.columns if isinstance(c, Slice))) if _is_parameter(t)]


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _adopt_wrappers(optimizer: Optimizer, census: Census) -> None:
    """Optimizers around ``optimizer`` that share its parameters and keep a state of their own (Lookahead, SAM)."""
    known = {id(o.state) for o in known_optimizers([optimizer])}
    groups = optimizer.param_groups
    for other in census.optimizers:
        state = getattr(other, "state", None)
        if state is not None and id(state) not in known and getattr(other, "param_groups", None) is groups:
            remember(other)


def _tables(census: Census, parameters: Sequence[Tensor]) -> list[str]:
    """Dicts from parameters to tensors that are no optimizer's state."""
    ours = {id(p) for p in parameters}
    states = {id(getattr(o, "state", None)) for o in census.optimizers}
    found = []
    for table in census.by_parameter:
        values = [v for p, v in list(table.items()) if id(p) in ours] if id(table) not in states else []
        if any(isinstance(w, Tensor) and w.ndim for v in values for w in (v.values() if isinstance(v, dict) else [v])):
            found.append(holder_of(table))
    return _names(found)


def _lists(census: Census, parameters: Sequence[Tensor]) -> list[str]:
    """Lists and dicts of other tensors that have the shapes of the particles' parameters, in their order."""
    ours = {t.data_ptr() for p in parameters for t in (p, p.grad) if t is not None and _has_memory(t)}
    found = []
    for thing in census.lists:
        values = [v for v in (thing.values() if isinstance(thing, dict) else thing) if issubclass(type(v), Tensor)]
        rest = iter(values)
        if len(values) < len(parameters) or any(v.requires_grad for v in values):
            continue  # parameters of another model
        if not all(any(v.shape == p.shape for v in rest) for p in parameters):
            continue
        if not any(_has_memory(v) and v.data_ptr() in ours for v in values) and not is_followed(thing):
            found.append(holder_of(thing))
    return _names(found)


def _names(holders: Iterable[Holder | None]) -> list[str]:
    named = [h for h in holders if h is not None and not is_told(h.owner)]
    own = ("torch.", "torch_meanfield.")
    return [str(h) for h in named if not f"{type(h.owner).__module__}.".startswith(own)]


def _has_memory(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is not None and not tensor.is_sparse


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
        holder = holder_of(what)
        if holder is None:
            break
        what, name = holder.owner, str(holder)
        if not isinstance(what, nn.Module):
            break
        name = type(what).__name__
    return name
