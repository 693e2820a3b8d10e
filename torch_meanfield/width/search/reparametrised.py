"""Weights that are computed from other tensors before they are used: whose units can be replaced, and whose cannot.

That a permutation of the units leaves the function as it is does not suffice for births: under spectral normalisation
it does, and yet a newborn unit changes the norm by which all others are divided. Here units must be *independent*:
changing the entries of some leaves the weights of the others as they are, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from torch_meanfield._torch import buffers_of, children_of, forward_pre_hooks, parameters_of, pruned_name
from torch_meanfield.observe import fake_quantiser, undisturbed
from torch_meanfield.particles import Slice
from torch_meanfield.particles.neurons import Neurons


@dataclass(frozen=True)
class _Computed:
    """A weight that is computed from ``sources``; ``by`` its parametrization, ``None`` for the older hooks."""

    name: str
    how: str
    sources: frozenset[int]
    by: ParametrizationList | None


class Reparametrised:
    """What in ``model`` is computed before it is used.

    Args:
        model: any module, or ``None``: then nothing is known.

    Attributes:
        quantiser: name of a fake quantiser of activations or weights, if there is one: what it rounds by, all units
            share, and in a copy in double precision it does not run.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.quantiser = None if model is None else fake_quantiser(model)
        self._computed: dict[int, _Computed] = {}
        for name, module in () if model is None else model.named_modules():
            for computed in _of(module, f"{name}." if name else ""):
                self._computed.update(dict.fromkeys(computed.sources, computed))

    def entangled(self, population: Neurons) -> str | None:
        """Why units of ``population`` cannot be replaced one at a time, as a phrase; ``None`` if they can."""
        if self.quantiser is not None:
            return f"the model rounds by a fake quantiser, {self.quantiser}, whose scale the units share"
        columns = population.slices(population.columns)
        for column, role in zip(columns, population.roles, strict=True):
            computed = self._computed.get(id(column.tensor))
            if computed is None:
                continue
            mine = [c for c in columns if id(c.tensor) in computed.sources]
            if role == "out" or any(r == "out" for c, r in zip(columns, population.roles, strict=True) if c in mine):
                return (
                    f"its outgoing weight {computed.name} is computed by {computed.how} from the tensors the units "
                    f"own, so these tell neither the potential of a unit nor how to be born with none"
                )
            if computed.by is None or not _independent(computed.by, mine):
                return (
                    f"{computed.name} is computed by {computed.how}, in which units are not independent: one that is "
                    f"replaced changes others"
                )
        return None


def _of(module: nn.Module, prefix: str) -> list[_Computed]:
    """The weights of ``module`` that are computed."""
    found: list[_Computed] = []
    lists = children_of(module).get("parametrizations")
    for name, each in lists.named_children() if isinstance(lists, nn.ModuleDict) else ():
        if isinstance(each, ParametrizationList):
            how = ", ".join(type(m).__name__.lstrip("_") for m in each)
            found.append(_Computed(prefix + name, how, _ids((*each.parameters(), *each.buffers())), each))
    for hook in forward_pre_hooks(module).values():
        if isinstance(hook, (WeightNorm, SpectralNorm, BasePruningMethod)):
            name = pruned_name(hook) if isinstance(hook, BasePruningMethod) else hook.name
            theirs = {k: t for k, t in (*parameters_of(module).items(), *buffers_of(module).items()) if t is not None}
            how = f"{type(hook).__name__} (a hook of torch.nn.utils)"
            sources = _ids(t for k, t in theirs.items() if k.startswith(f"{name}_"))
            found.append(_Computed(prefix + name, how, sources, None))
    return found


def _ids(tensors: Iterable[Tensor]) -> frozenset[int]:
    return frozenset(id(t) for t in tensors)


@torch.no_grad()
def _independent(by: ParametrizationList, columns: list[Slice]) -> bool:
    """Whether the units of ``columns`` own all that is learned in ``by``, and each makes its own weights from it."""
    owned = {id(c.tensor) for c in columns}
    if any(id(p) not in owned for p in by.parameters()):
        return False
    places = {id(t): i for i, t in enumerate((*by.parameters(), *by.buffers()))}
    generator = torch.Generator().manual_seed(0)
    for half in (0, 1):
        copy = deepcopy(by).eval()
        tensors = (*copy.parameters(), *copy.buffers())
        with undisturbed():
            before = copy()
        like = next((c for c in columns if c.tensor.shape == before.shape), None)
        if like is None:
            return False  # which part of the weight is a unit's cannot be told
        for column in columns:
            theirs = column.on(tensors[places[id(column.tensor)]])
            units = theirs.by_particle(theirs.tensor).movedim(column.dim + 1, 0)[half::2]
            units.copy_(torch.randn(units.shape, generator=generator, device="cpu"))
        with undisturbed():
            after = copy()
        layout = like.on(before)
        old, new = (layout.by_particle(t.contiguous()).movedim(like.dim + 1, 0)[1 - half :: 2] for t in (before, after))
        if not torch.equal(old, new):
            return False
    return True
