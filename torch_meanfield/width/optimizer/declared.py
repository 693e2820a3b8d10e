"""From what the user passes as ``populations`` to populations whose every parameter the optimizer owns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_meanfield.particles import Slice
from torch_meanfield.particles.copying import is_sharded
from torch_meanfield.particles.neurons import Neurons, neurons_from
from torch_meanfield.particles.population import tensors_of
from torch_meanfield.particles.resampled import Resampled
from torch_meanfield.particles.unmoved import Asked
from torch_meanfield.width.search.reparametrised import Reparametrised
from torch_meanfield.width.turnover.blocks import Blocks


def declared(populations: Any, model: nn.Module | None, optimizer: Optimizer) -> list[Neurons | Blocks]:
    """One population or several: :class:`Neurons`, lists of ``(tensor, dim)``, mean-field layers; all checked.

    Raises:
        TypeError: not populations.
        ValueError: none at all, one the optimizer does not own, tensors on several devices, units that cannot be
            replaced one at a time (see :mod:`.reparametrised`), or two populations that move
            the same entries.
    """
    alone = isinstance(populations, (Neurons, Resampled)) or _is_slices(populations)
    entries = [populations] if alone else populations
    if isinstance(entries, (str, Tensor)) or not isinstance(entries, Sequence):
        raise TypeError(
            f"populations must be 'auto', a population, or a list of them (each a Neurons, a list of (tensor, dim), or "
            f"a mean-field layer, whose blocks it is), got {populations!r:.80}"
        )
    found = [_population(entry, f"populations[{i}]", model) for i, entry in enumerate(entries)]
    if not found:
        raise ValueError("populations is empty; declare at least one, or pass populations='auto' with a model")
    computed = Reparametrised(model)
    for population in found:
        check_owned(population, optimizer)
        reason = computed.entangled(population) if isinstance(population, Neurons) else None
        if reason is not None:
            raise ValueError(f"{population.name}: {reason}; leave the population out")
        if isinstance(population, Blocks) and model is not None:
            population.layer.check_untied(model)
    check_disjoint(found)
    return found


def _population(entry: Any, name: str, model: nn.Module | None) -> Neurons | Blocks:
    if isinstance(entry, Neurons):
        return entry
    if isinstance(entry, nn.Module):
        return Blocks(entry, name)
    return neurons_from(entry, name=name, owner=_owner(entry, model))


def _is_slices(populations: Any) -> bool:
    """One population given as its list of slices, rather than a list of populations."""
    if not isinstance(populations, (list, tuple)) or not populations:
        return False
    first = populations[0]
    return isinstance(first, Slice) or (isinstance(first, tuple) and len(first) == 2 and isinstance(first[0], Tensor))


def _owner(entry: Any, model: nn.Module | None) -> nn.Module | None:
    """``model`` if it holds every declared tensor: then its averaged copies can follow."""
    if model is None or not isinstance(entry, (list, tuple)):
        return None
    held = {id(t) for t in (*model.parameters(), *model.buffers())}
    tensors = [e.tensor if isinstance(e, Slice) else e[0] for e in entry if isinstance(e, (Slice, tuple, list)) and e]
    return model if all(id(t) in held for t in tensors) else None


def owned_ids(optimizer: Optimizer) -> set[int]:
    """The identities of the parameters that ``optimizer`` steps."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def foreign(population: Neurons | Blocks, optimizer: Optimizer) -> Slice | None:
    """The first column that is a parameter to be trained but not one of the optimizer's.

    Of blocks it is the positions that count: their weights may be trained elsewhere, and their state moves along.
    """
    owned = owned_ids(optimizer)
    if isinstance(population, Blocks):
        return None if id(population.parameter) in owned else Slice(population.parameter)
    for column, role in zip(population.slices(population.columns), population.roles, strict=True):
        # a frozen parameter and a buffer belong to no optimizer; an outgoing weight must be trained, or has no gradient
        if (column.tensor.requires_grad or role == "out") and id(column.tensor) not in owned:
            return column
    return None


def check_owned(population: Neurons | Blocks, optimizer: Optimizer) -> None:
    """Raise ``ValueError`` for a parameter that ``optimizer`` does not own, or tensors on several devices."""
    column = foreign(population, optimizer)
    for c in () if isinstance(population, Blocks) else population.slices(population.columns):
        if _is_computed(c.tensor, optimizer):
            raise ValueError(
                f"{population.name}: the tensor of shape {tuple(c.tensor.shape)} along dimension {c.dim} is no tensor "
                f"of its own but computed from others (by a parametrization or a hook of torch.nn.utils) or a view of "
                f"one; declare what the optimizer owns, such as module.parametrizations.weight.original0"
            )
    if column is not None:
        raise ValueError(
            f"{population.name}: the tensor of shape {tuple(column.tensor.shape)} along dimension {column.dim} is not "
            f"one of the optimizer's parameters; add it to the optimizer (add_param_group), or leave the population out"
        )
    if isinstance(population, Blocks):
        return  # the layer has checked its own tensors
    devices = {c.tensor.device for c in population.slices(population.columns)}
    if len(devices) > 1:
        raise ValueError(
            f"{population.name}: its tensors lie on {sorted(map(str, devices))}; a population lives on one device, so "
            f"move the model before it is wrapped"
        )
    for c in population.slices(population.columns):
        if not c.tensor.is_floating_point() or c.tensor.is_meta or c.tensor.layout != torch.strided:
            raise ValueError(
                f"{population.name}: a tensor of shape {tuple(c.tensor.shape)} is {c.tensor.dtype}, {c.tensor.layout} "
                f"on {c.tensor.device}; units own dense floating-point tensors that hold "
                f"data: move the model off the meta device, or leave it out"
            )


def _is_computed(tensor: Tensor, optimizer: Optimizer) -> bool:
    """Whether ``tensor`` has a history, or shares its memory with a parameter of the optimizer without being it."""
    if tensor.grad_fn is not None:
        return True
    owned = owned_ids(optimizer)
    if id(tensor) in owned or tensor.layout != torch.strided or tensor.is_meta or is_sharded(tensor):
        return False
    place = tensor.untyped_storage().data_ptr()
    # a sharded parameter has no memory of its own to ask for, and nothing is a view of it
    parameters = (p for group in optimizer.param_groups for p in group["params"] if not is_sharded(p))
    shared = (p for p in parameters if p.layout == torch.strided and p.device == tensor.device)
    return any(place != 0 and p.untyped_storage().data_ptr() == place for p in shared)


def asked(populations: Sequence[Neurons | Blocks], model: nn.Module | None) -> list[Asked]:
    """The neurons, as :func:`.unmoved.ask` wants them; blocks are asked for by their layer."""
    neurons = [p for p in populations if isinstance(p, Neurons)]
    owned = {id(t): t for t in tensors_of(c for p in neurons for c in p.columns)}
    order = owned.values() if model is None else [p for p in model.parameters() if id(p) in owned]
    owners = list({id(p.owner): p.owner for p in neurons}.values())
    return [Asked(f"{len(neurons)} populations of units", owner, list(order)) for owner in owners]


def check_disjoint(populations: Sequence[Neurons | Blocks]) -> None:
    """Raise ``ValueError`` if two populations move the same dimension of the same tensor."""
    modules = [p.module for p in populations if isinstance(p, Blocks)]
    if len({id(m) for m in modules}) < len(modules):
        raise ValueError("populations names the same layer twice; declare it once")
    seen: dict[tuple[int, int], str] = {}
    for population in populations:
        for column in () if isinstance(population, Blocks) else population.slices(population.columns):
            key = (id(column.tensor), column.dim)
            if key in seen:
                raise ValueError(
                    f"{population.name} and {seen[key]} both own dimension {column.dim} of the tensor of shape "
                    f"{tuple(column.tensor.shape)}; declare it once"
                )
            seen[key] = population.name
