"""Averaged copies follow: slot l of the copy goes on averaging the particle that slot l of the model holds.

``torch.optim.swa_utils.AveragedModel`` (so Lightning's ``WeightAveraging``) and timm's ``ModelEma*`` average a
deep copy slot by slot. A deep copy that such a class registers as its submodule is recognised here, and from then on
moves with its source; any other deep copy is a model of its own and is never touched. Averages of other make are
named once with :func:`follow`; :mod:`.unmoved` asks for those that were forgotten.

Lightning makes its copy before it asks for an optimizer, hence before a ``BirthDeathOptimizer`` can have told that the
model holds populations. What the averaging class was given to copy is therefore remembered until they become known.
"""

from __future__ import annotations

import gc
import inspect
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.swa_utils import AveragedModel

from torch_meanfield.particles.events import Motion, subscribe
from torch_meanfield.particles.kept_tensors import KeptTensors
from torch_meanfield.particles.population import Column, Population, Slice, named_tensors
from torch_meanfield.particles.slices import write_rows_
from torch_meanfield.particles.transport import transport_


class Lineage:
    """Who a module was copied from. Kept in the module's ``__dict__`` under ``_lineage``, so deep copies carry it.

    Attributes:
        module: the module itself (weakly), once bound.
        origin: the lineage it was deep-copied from (weakly), if any.
        copies: lineages of its deep copies.
        followers: lineages of averaged copies that move with this module.
        following: this module is an averaged copy.
        averaged: it is one or has one: places may then hold averages whose tau is not ascending.
        name: the attribute under which the module was last registered.
    """

    def __init__(self) -> None:
        self.module: weakref.ref[nn.Module] | None = None
        self.origin: weakref.ref[Lineage] | None = None
        self.copies: weakref.WeakSet[Lineage] = weakref.WeakSet()
        self.followers: weakref.WeakSet[Lineage] = weakref.WeakSet()
        self.following = False
        self.averaged = False
        self.name = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Lineage:
        twin = Lineage()
        twin.origin = weakref.ref(self)
        self.copies.add(twin)
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


def follow(copy: nn.Module | Sequence[Tensor] | Mapping[Any, Tensor], model: nn.Module) -> int:
    """Make ``copy``, an average of ``model`` kept by code this library does not know, move with ``model``.

    Not needed for ``AveragedModel``, Lightning's ``WeightAveraging`` and ``StochasticWeightAveraging`` and timm's
    ``ModelEmaV2``/``V3``, which are recognised by themselves when they are made from the model itself; where that
    cannot be told, a warning asks for it.

    Args:
        copy: the averaged model, of the same structure as ``model``; or its tensors, a list or dict in the order of
            ``model.parameters()`` (all of them, or those that are trained), or a dict by their names. A list that is an
            attribute of an object (``ema.shadow_params``) is looked up there again, in case the object replaces it.
        model: the model that is trained.

    Returns:
        how many modules were paired: ``model`` itself, and every module inside it that holds a population already; or
        how many tensors.

    Raises:
        TypeError: ``model`` is not a module, or ``copy`` is neither a module nor tensors.
        ValueError: ``copy`` is ``model``, or lacks one of its tensors or of its modules that hold a population.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"follow: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(copy, (Sequence, Mapping)) and not isinstance(copy, str):
        kept = KeptTensors(copy, model)
        _kept.setdefault(model, []).append(kept)
        for module in model.modules():
            if "_lineage" in module.__dict__:
                lineage_of(module).averaged = True
        return len(kept.keys)
    if not isinstance(copy, nn.Module):
        raise TypeError(
            f"follow: copy must be a torch.nn.Module, or a list or dict of tensors, got {type(copy).__name__}"
        )
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

    A copy of ``owner``'s structure of which it is not known what it was made from may be an average of ``owner`` or of
    another model, and a warning names both.
    """
    strangers: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
    for copy, reference in list(_copied_from.items()):
        source = reference() if reference is not None else None
        inside = set() if source is None else {name for name, module in source.named_modules() if module is owner}
        for name, twin in copy.named_modules():
            if name in inside or (source is None and _alike(twin, owner) and _related(twin, owner)):
                _pair(lineage_of(twin), lineage_of(owner))
            elif source is None and _alike(twin, owner) and _related(twin, owner) is None:
                strangers[twin] = name
    if strangers:
        gc.collect()  # what nobody holds any more says nothing
    for name in strangers.values():
        warnings.warn(
            f"an averaged copy of a {type(owner).__name__}{f' ({name!r} in it)' if name else ''} was made before this "
            f"{type(owner).__name__}'s optimizer was wrapped, and what it was made from is gone or unknown: if it "
            f"averages this one, call torch_meanfield.follow(copy, model), or its units will be averages of those that "
            f"died and of those born in their places",
            RuntimeWarning,
            stacklevel=2,
        )


def _alike(module: nn.Module, owner: nn.Module) -> bool:
    """Whether ``module`` has the class and the parameters of ``owner``, by name and shape, and follows nothing."""
    if type(module) is not type(owner) or module is owner or lineage_of(module).following:
        return False
    mine, theirs = ({n: p.shape for n, p in m.named_parameters()} for m in (owner, module))
    return mine == theirs


def _related(copy: nn.Module, owner: nn.Module) -> bool | None:
    """Whether what is inside ``copy`` follows what is inside ``owner``; ``None`` if nothing inside follows anything."""
    theirs = dict(copy.named_modules())
    for name, module in owner.named_modules():
        lineage: Lineage | None = theirs[name].__dict__.get("_lineage") if name in theirs else None
        if lineage is not None and lineage.following:
            return lineage in lineage_of(module).followers
    return None


def averages_of(owner: nn.Module) -> list[tuple[nn.Module, nn.Module | None]]:
    """The averaged copies that move with ``owner``, each with the whole averaged model around it, if that is known."""
    lineage: Lineage | None = owner.__dict__.get("_lineage")
    followers = [f for f in lineage.followers if f.following] if lineage is not None else []
    copies = [f.module() for f in followers if f.module is not None]
    roots = list(_copied_from)
    return [(c, next((r for r in roots if any(m is c for m in r.modules())), None)) for c in copies if c is not None]


def shorten_kept_(population: Population, size: int, undo: ExitStack) -> None:
    """Cut the averages of ``population`` that are lists or dicts of tensors to its first ``size`` particles."""
    for model, averages in list(_kept.items()):
        for each in averages:
            each.shorten_(population, model, size, undo)


_kept: weakref.WeakKeyDictionary[nn.Module, list[KeptTensors]] = weakref.WeakKeyDictionary()


def is_followed(kept: Any) -> bool:
    """Whether ``kept``, a list or dict of tensors, moves with a model."""
    return any(each.tensors() is kept for all_of_one in _kept.values() for each in all_of_one)


def trained_by_itself(module: Any) -> None:
    """An optimizer has stepped on ``module``: it is no longer an average of another."""
    lineage_of(module).following = False


def _pair(copy: Lineage, source: Lineage) -> None:
    source.followers.add(copy)
    copy.following = copy.averaged = source.averaged = True


# The copies that averaging classes hold, and what each was made from, for models whose populations become known later.
_copied_from: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module] | None] = weakref.WeakKeyDictionary()


def _is_averager(module: nn.Module) -> bool:
    return isinstance(module, AveragedModel) or any(
        c.__module__ == "timm.utils.model_ema" and c.__name__.startswith("ModelEma") for c in type(module).__mro__
    )


def _given(averager: nn.Module, copy: nn.Module) -> nn.Module | None:
    """The model that the constructor of ``averager``, if it is running, was given to make ``copy`` from.

    A deep copy bears no trace of a plain module. The averaging class does know: it registers the copy in its own
    constructor, where the model is the one other module of the copy's class.
    """
    frame = inspect.currentframe()
    while frame is not None and not (frame.f_code.co_name == "__init__" and frame.f_locals.get("self") is averager):
        frame = frame.f_back
    here = frame.f_locals.values() if frame is not None else ()
    given = {id(v): v for v in here if type(v) is type(copy) and v is not copy}
    return next(iter(given.values())) if len(given) == 1 else None


def _on_registration(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if submodule is None:
        return
    own: Lineage | None = submodule.__dict__.get("_lineage")
    if own is not None:
        own.name = name
    if _is_averager(module):
        recognise(submodule, _given(module, submodule))


def recognise(copy: nn.Module, source: nn.Module | None = None) -> None:
    """``copy`` is an average: let it move with what it was copied from, which is ``source`` if that is known."""
    if source is not None or copy not in _copied_from:
        _copied_from[copy] = None if source is None else weakref.ref(source)
    for m in copy.modules():
        lineage: Lineage | None = m.__dict__.get("_lineage")
        origin = lineage.origin() if lineage is not None and lineage.origin is not None else None
        if origin is not None:
            _pair(lineage_of(m), origin)


def _on_motion(motion: Motion) -> None:
    owner = motion.population.owner
    if owner is None or motion.cause in ("load", "follow"):
        return  # a load replaces values, it does not move particles: the copy has a checkpoint of its own
    lineage: Lineage | None = owner.__dict__.get("_lineage")
    for follower in list(lineage.followers) if lineage is not None else []:
        copy = follower.module() if follower.module is not None else None
        if copy is not None and follower.following:
            twin = motion.population.within(copy)
            _carry(motion, dict(enumerate(twin.columns)), twin)
    for model, averages in list(_kept.items()):
        for each in averages:
            columns = each.columns(motion.population, model)
            if columns:
                _carry(motion, columns, Population(list(columns.values()), name=motion.population.name))


def _carry(motion: Motion, columns: Mapping[int, Column], twin: Population) -> None:
    """What ``motion`` did to its population, done to ``twin``, whose columns have the numbers of its own."""
    if motion.born is None:
        transport_(twin, motion.index, cause="follow", state=False)
        return
    for i in motion.values.keys() & columns.keys():
        column = columns[i]
        assert isinstance(column, Slice)
        device = column.tensor.device
        write_rows_(column, motion.born.to(device), motion.values[i].to(device))


register_module_module_registration_hook(_on_registration)
subscribe(_on_motion)
