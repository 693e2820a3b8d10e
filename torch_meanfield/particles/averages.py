"""Averaged copies follow: slot l of the copy goes on averaging the particle that slot l of the model holds.

``torch.optim.swa_utils.AveragedModel`` (so Lightning's ``WeightAveraging``) and timm's ``ModelEma*`` average a
deep copy slot by slot. A deep copy that such a class registers as its submodule is recognised here, and from then on
moves with its source; any other deep copy is a model of its own and is never touched. Averages of other make are
named once with :func:`follow`.

Lightning makes its copy before it asks for an optimizer, hence before a ``BirthDeathOptimizer`` can have told that the
model holds populations. Such a copy is recognised when they become known: by a mean-field layer in it that was copied
from the model's, or by being the same as the model, bit for bit.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.swa_utils import AveragedModel

from torch_meanfield.particles.copying import whole
from torch_meanfield.particles.events import Motion, subscribe
from torch_meanfield.particles.population import Slice, named_tensors
from torch_meanfield.particles.slices import write_rows_
from torch_meanfield.particles.transport import transport_


class Lineage:
    """Who a module was copied from. Kept in the module's ``__dict__`` under ``_lineage``, so deep copies carry it.

    Attributes:
        module: the module itself (weakly), once bound.
        origin: the lineage it was deep-copied from (weakly), if any.
        followers: lineages of averaged copies that move with this module.
        following: this module is an averaged copy.
        averaged: it is one or has one: places may then hold averages whose tau is not ascending.
        name: the attribute under which the module was last registered.
    """

    def __init__(self) -> None:
        self.module: weakref.ref[nn.Module] | None = None
        self.origin: weakref.ref[Lineage] | None = None
        self.followers: weakref.WeakSet[Lineage] = weakref.WeakSet()
        self.following = False
        self.averaged = False
        self.name = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Lineage:
        twin = Lineage()
        twin.origin = weakref.ref(self)
        twin.name = self.name
        return twin

    def __reduce__(self) -> tuple[type[Lineage], tuple[()]]:
        return Lineage, ()  # another process, another family

    def bind(self, module: nn.Module) -> None:
        """Remember which module this is the lineage of."""
        self.module = weakref.ref(module)


def lineage_of(module: nn.Module) -> Lineage:
    """The lineage of ``module``, begun if it has none yet."""
    lineage: Lineage | None = module.__dict__.get("_lineage")
    if lineage is None:
        lineage = module.__dict__["_lineage"] = Lineage()
    if lineage.module is None or lineage.module() is not module:
        lineage.bind(module)
    return lineage


def follow(copy: nn.Module, model: nn.Module) -> int:
    """Make ``copy``, an averaged copy of ``model`` kept by code this library does not know, move with ``model``.

    Not needed for ``AveragedModel``, Lightning's ``WeightAveraging`` and timm's ``ModelEmaV2``/``V3``, which are
    recognised by themselves, unless the model was trained between the making of the copy and the wrapping of its
    optimizer in a ``BirthDeathOptimizer``; a warning says so then.

    Args:
        copy: the averaged model, of the same structure as ``model``.
        model: the model that is trained.

    Returns:
        how many modules were paired: ``model`` itself, and every module inside it that holds a population already.

    Raises:
        TypeError: ``copy`` or ``model`` is not a module.
        ValueError: ``copy`` is ``model``, or lacks one of its tensors or of its modules that hold a population.
    """
    for argument, module in (("copy", copy), ("model", model)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"follow: {argument} must be a torch.nn.Module, got {type(module).__name__}")
    if copy is model:
        raise ValueError("follow: copy is model itself; pass the averaged copy, such as AveragedModel's .module")
    shapes = {name: t.shape for name, t in named_tensors(copy).items()}
    for name, tensor in named_tensors(model).items():
        if shapes.get(name) != tensor.shape:
            raise ValueError(
                f"follow: copy has no tensor {name!r} of shape {tuple(tensor.shape)}; it must have the structure of "
                f"model (of an AveragedModel, pass its .module)"
            )
    theirs = dict(copy.named_modules())
    pairs = [(copy, model)]
    for name, module in model.named_modules():
        if "_lineage" in module.__dict__ and module is not model:
            twin = theirs.get(name)
            if twin is None or type(twin) is not type(module):
                raise ValueError(
                    f"follow: copy has no {type(module).__name__} at {name!r}; it must have the structure of model"
                )
            pairs.append((twin, module))
    for twin, module in pairs:
        _pair(lineage_of(twin), lineage_of(module))
    return len(pairs)


def adopt_averages(owner: nn.Module) -> None:
    """Let averaged copies of ``owner`` that were made before it was known to hold populations move with it.

    A copy of ``owner``'s structure is taken for one of it if a mean-field layer in it was copied from that of
    ``owner``, or if its parameters are still the same, bit for bit. Any other may be an average of ``owner`` or of
    another model, and a warning names it.
    """
    if not (strangers := _pair_alike(owner)):
        return
    gc.collect()  # what nobody holds any more says nothing
    for name in strangers.values():
        warnings.warn(
            f"an averaged copy of a {type(owner).__name__}{f' ({name!r} in it)' if name else ''} was made before this "
            f"one's optimizer was wrapped, and differs from it: if it averages this one, call "
            f"torch_meanfield.follow(copy, model), or its units will be averages of those that died and of those born "
            f"in their places",
            RuntimeWarning,
            stacklevel=2,
        )


def _pair_alike(owner: nn.Module) -> weakref.WeakKeyDictionary[nn.Module, str]:
    """Pair ``owner`` with its copies; what has its structure and may be one or not, by the name in what was copied."""
    strangers: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
    mine = dict(owner.named_parameters())
    for copy in list(_copies):
        for name, twin in copy.named_modules():
            if type(twin) is not type(owner) or twin is owner or lineage_of(twin).following:
                continue
            theirs = dict(twin.named_parameters())
            if mine.keys() != theirs.keys() or any(mine[k].shape != theirs[k].shape for k in mine):
                continue
            related = _related(twin, owner)
            if related or (related is None and _equal(mine, theirs)):
                _pair(lineage_of(twin), lineage_of(owner))
            elif related is None:
                strangers[twin] = name
    return strangers


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(whole(a[k]).cpu(), whole(b[k]).cpu()) for k in a)


def _related(copy: nn.Module, owner: nn.Module) -> bool | None:
    """Whether what is inside ``copy`` follows what is inside ``owner``; ``None`` if nothing inside follows anything."""
    theirs = dict(copy.named_modules())
    for name, module in owner.named_modules():
        lineage: Lineage | None = theirs[name].__dict__.get("_lineage") if name in theirs else None
        if lineage is not None and lineage.following:
            return lineage in lineage_of(module).followers
    return None


def trained_by_itself(module: Any) -> None:
    """An optimizer has stepped on ``module``: it is no longer an average of another."""
    lineage_of(module).following = False


def _pair(copy: Lineage, source: Lineage) -> None:
    source.followers.add(copy)
    copy.following = copy.averaged = source.averaged = True


# What averaging classes have made copies of, for models whose populations become known later.
_copies: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _is_averager(module: nn.Module) -> bool:
    return isinstance(module, AveragedModel) or any(
        c.__module__ == "timm.utils.model_ema" and c.__name__.startswith("ModelEma") for c in type(module).__mro__
    )


def _on_registration(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if submodule is None:
        return
    own: Lineage | None = submodule.__dict__.get("_lineage")
    if own is not None:
        own.name = name
    if _is_averager(module):
        _copies.add(submodule)
        for m in submodule.modules():
            lineage: Lineage | None = m.__dict__.get("_lineage")
            source = lineage.origin() if lineage is not None and lineage.origin is not None else None
            if source is not None:
                _pair(lineage_of(m), source)


def _on_motion(motion: Motion) -> None:
    owner = motion.population.owner
    if owner is None or motion.cause in ("load", "follow"):
        return  # a load replaces values, it does not move particles: the copy has a checkpoint of its own
    lineage: Lineage | None = owner.__dict__.get("_lineage")
    for follower in list(lineage.followers) if lineage is not None else []:
        copy = follower.module() if follower.module is not None else None
        if copy is None or not follower.following:
            continue
        twin = motion.population.within(copy)
        if motion.born is None:
            transport_(twin, motion.index, cause="follow", state=False)
            continue
        for i, value in motion.values.items():
            column = twin.columns[i]
            assert isinstance(column, Slice)
            device = column.tensor.device
            write_rows_(column, motion.born.to(device), value.to(device))


register_module_module_registration_hook(_on_registration)
subscribe(_on_motion)
