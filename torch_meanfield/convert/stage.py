"""``ConvertedStage``: a run of blocks of an existing model as particles on a tau axis."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from torch_meanfield.convert.carried import Carried
from torch_meanfield.convert.sites import WAY_OUT, Place, Site, attach, descend, detach, site_of
from torch_meanfield.depth.exchangeable import check_alike
from torch_meanfield.depth.layer import MeanFieldLayer
from torch_meanfield.depth.tau_axis import nonnegative, steps_by_slot
from torch_meanfield.particles import Population, Slice, Stack
from torch_meanfield.particles.copying import is_sharded
from torch_meanfield.particles.population import Column, named_tensors
from torch_meanfield.particles.traits import Traits


class ConvertedStage(MeanFieldLayer):
    """The tau axis of a run of residual blocks that stay where they are in their model.

    Block (or group of blocks) i is the particle in slot i. The blocks run in the order of their slots, as the model's
    own ``forward`` has it, and the particle in slot i takes the step ``tau_i`` minus the next smaller tau. After each
    optimizer step the particles are re-sorted, so that both orders agree; where they are not sorted (automatic
    re-sorting switched off, averaged copies), each slot runs the block whose turn it is in the order of tau; in
    compiled code, and under FSDP2, its own, with the step that the block has in that order.

    The stage owns the places where its steps act. When a block runs, and at each re-sort, optimizer step and ``fold``,
    it sees that the module that stands there now scales: one that was put there later (a synchronised norm, an adapter
    around the layer, a parametrised weight) is multiplied as a whole where that is the same, else there is an error.

    Args:
        particles: for each slot the block, or the blocks that travel together. They are held weakly, and a copy of
            the whole model has a stage of its own that holds the copies.
        horizon: the last time T.
        carries: whether constants travel with the particles, see :mod:`.carried`.

    Attributes:
        outside: for each block of a particle whether what it puts out is a branch that the model's own loop adds
            (``True``), comes before such a one (``None``), or holds the sum already (``False``).

    Raises:
        ValueError: blocks whose tensors do not correspond.
    """

    def __init__(self, particles: Sequence[Sequence[nn.Module]], horizon: float, *, carries: bool = False) -> None:
        super().__init__()
        self.members = Members(particles)
        self.places: dict[tuple[int, int], tuple[Place, ...]] = {}
        self.outside: tuple[bool | None, ...] = ()
        columns = self._columns()
        tensors = [t for c in columns for t in c.tensors]
        first = next((t for t in tensors if t.is_floating_point()), None)
        self._place_on_axis(len(particles), horizon, first)
        self.carried = Carried(len(particles), self.tau_axis.anchor) if carries else None
        Population(columns, name=self._label())  # refuses what two particles hold
        self.tau_axis.mark_sorted()

    def step(self, slot: int) -> Tensor:
        """The step size of the particle in ``slot``, differentiable; a tensor of shape ``()``."""
        tau = self.tau_axis.positions()
        if not torch.compiler.is_compiling() and self.tau_axis.is_sorted():  # as entering the block saw
            return nonnegative(tau[slot] - tau[slot - 1] if slot else tau[0])
        return steps_by_slot(tau)[slot]

    def enter_(self, site: Site) -> Site:
        """A block is about to run: the site of the block whose turn it is, all of its places seen to."""
        slot, member = site.place.slot, site.place.member
        order = None if torch.compiler.is_compiling() else self._execution_order()
        if order is not None and order[slot] != slot:
            other = self[order[slot]][member]
            # Neither a forward of a tool's own nor what FSDP2 gathers by hooks can run in the place of another.
            if (theirs := site_of(other)) is not None and not any(is_sharded(p) for p in other.parameters()):
                site = theirs
        block = site.module()
        if block is not None:
            self._hold_(block, site.place.inside or (), entered=True)
        return site

    def check_held_(self) -> None:
        """See that every step acts on the module that stands at its place now.

        Raises:
            RuntimeError: a block or a layer is gone, or is one that a step cannot act on; it is named.
        """
        for slot, blocks in enumerate(self):
            for member, block in enumerate(blocks):
                self._hold_(block, self.places.get((slot, member), ()))

    def _hold_(self, block: nn.Module, places: tuple[Place, ...], entered: bool = False) -> None:
        for place in places:
            if entered and not place.path:  # a tool's forward around the block's, if any, has called the block's
                continue
            module = descend(block, place.path)
            site = None if module is None else module.__dict__.get("forward")
            if type(site) is not Site or site.place is not place or site.turn != place.turn:
                self._retake_(block, place, module, site)

    def _retake_(self, block: nn.Module, place: Place, module: nn.Module | None, site: Any) -> None:
        """Let the step act on what a tool has put in place of the layer, or taken away from around it."""
        wrapped = [n for n, m in block.named_modules() if (s := site_of(m)) and s.place is place]
        if module is None and wrapped:  # something around the layer and its parent
            place.path = wrapped[0]
            return
        if module is None or not (place.whole or place.output or place.takes(module)):
            raise RuntimeError(f"{self._label()}: {place.changed(module)}, and its step acts on nothing; {WAY_OUT}")
        place.turn += 1
        if type(site) is Site and site.place is place:
            site.turn = place.turn
        else:
            attach(module, Site(self, place))

    def population(self) -> Population:
        """The particles: each owns one tensor of every name in its blocks, and its position on the tau axis."""
        self.check_held_()
        columns: list[Column] = list(self._columns())
        carried = getattr(self, "carried", None)  # not in stages that older versions pickled
        columns += [] if carried is None else [Slice(carried.home)]
        columns += [Slice(t) for t in named_tensors(self.tau_axis).values()]
        mine = set(self.modules())  # a stage may be registered inside a block
        traits = Traits([[m for block in blocks for m in block.modules() if m not in mine] for blocks in self])
        return _Blocks(columns, owner=self, name=self._label(), traits=traits)

    def _columns(self) -> list[Stack]:
        mine = {id(t) for t in named_tensors(self).values()}
        tensors = [
            {f"{k}.{name}": t for k, block in enumerate(blocks) for name, t in named_tensors(block).items()}
            for blocks in self
        ]
        # The stage itself may be registered inside a block; its names exist there alone.
        tensors = [{n: t for n, t in theirs.items() if id(t) not in mine} for theirs in tensors]
        check_alike(list(self), tensors, self._label())
        names = {id(t): name for name, t in reversed(tensors[0].items())}.values()
        columns = []
        for name in reversed(list(names)):
            row = [theirs[name] for theirs in tensors]
            # What all blocks share belongs to no particle.
            if len(row) > 1 and all(t is row[0] for t in row):
                continue
            columns.append(Stack(row))
        return columns

    def take_out_(self, size: int, undo: ExitStack) -> None:
        """See :meth:`.MeanFieldLayer.take_out_`; the blocks that are out run by their own forward again."""
        members, places = list(self.members), dict(self.places)
        undo.callback(self.__dict__.update, members=self.members, places=self.places)
        for block in (b for blocks in members[size:] for b in blocks):
            for module in block.modules():
                site = site_of(module)
                if site is not None and site.stage is self:
                    undo.callback(module.__dict__.__setitem__, "forward", site)
                    detach(module)
        self.members = Members(members[:size])
        self.places = {key: theirs for key, theirs in places.items() if key[0] < size}

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[tuple[nn.Module, ...]]:
        return iter(self.members)

    def __getitem__(self, i: int) -> tuple[nn.Module, ...]:
        """The blocks in slot i."""
        return list(self.members)[i]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A stage is not called: the model's own forward runs its blocks."""
        raise TypeError(f"{self._label()} is not called; the blocks run in the model's own forward")

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._save_to_state_dict(*args, **kwargs)
        frame = inspect.currentframe()
        while frame is not None and frame.f_code.co_name != "save_pretrained":
            frame = frame.f_back
        if frame is not None and not self.tau_axis.is_fresh:
            warnings.warn(
                f"{self._label()}: save_pretrained() writes weights without the steps that scale them, and "
                f"from_pretrained() makes a network that has none and ignores tau. Save fold(model), or load by "
                f"convert(model) and then load_state_dict()",
                RuntimeWarning,
                stacklevel=2,
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        keys = [f"{prefix}{name}" for name in named_tensors(self)]
        self._absent = keys if not any(k in state_dict for k in keys) else []

    def _loaded(self, incompatible_keys: Any) -> None:
        self.tau_axis.keep_exact_()
        # A checkpoint of the unconverted model has no tau: the stage keeps its own.
        absent = self.__dict__.pop("_absent", [])
        missing = incompatible_keys.missing_keys
        missing[:] = [k for k in missing if k not in absent]
        if absent and not self.tau_axis.is_fresh:
            warnings.warn(
                f"{self._label()}: what was loaded is of a model that was not converted and holds no tau; its blocks "
                f"keep the steps {[round(s, 4) for s in self.steps().tolist()]} that they have here. For the loaded "
                f"network itself call tau_axis.reset_parameters() of this stage",
                RuntimeWarning,
                stacklevel=2,
            )
        carried = getattr(self, "carried", None)
        if absent and carried is not None and carried.has_moved():
            warnings.warn(
                f"{self._label()}: what was loaded is of a model that was not converted, but the blocks here have "
                f"changed places and carry constants with them; call carried.reset_parameters() of this stage",
                RuntimeWarning,
                stacklevel=2,
            )
        # Unsorted slots stay as they are until the next step: steps() and step() take them by rank, and other blocks
        # of the model may not have been loaded yet.
        self.tau_axis.mark_sorted(False)


class Members:
    """The blocks of a stage, weakly; a copy (or pickle) of the whole model refers to the copied blocks."""

    def __init__(self, particles: Sequence[Sequence[nn.Module]]) -> None:
        self.__setstate__([tuple(blocks) for blocks in particles])

    def __iter__(self) -> Iterator[tuple[nn.Module, ...]]:
        for blocks in self._blocks:
            found = tuple(ref() for ref in blocks)
            if any(m is None for m in found):
                raise RuntimeError(
                    "a block of this converted stage no longer exists: it was replaced in the model, or the stage was "
                    "copied without its model; fold(model) before changing blocks"
                )
            yield found  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self._blocks)

    def __getstate__(self) -> list[tuple[nn.Module | None, ...]]:
        return [tuple(ref() for ref in blocks) for blocks in self._blocks]

    def __setstate__(self, state: Sequence[tuple[nn.Module | None, ...]]) -> None:
        self._blocks = tuple(tuple(_gone if m is None else weakref.ref(m) for m in blocks) for blocks in state)


def _gone() -> None:
    """Stands in for the reference to a block that no longer exists."""


class _Blocks(Population):
    """A population whose tensors lie outside its owner."""

    def within(self, copy: nn.Module) -> Population:
        if not isinstance(copy, ConvertedStage) or len(copy) != self.size:
            raise ValueError(
                f"{self.name}: the copy ({type(copy).__name__}) is no converted stage of {self.size} particles; "
                f"averaged copies must have the structure of the model they follow"
            )
        return copy.population()


def stages_of(model: nn.Module) -> dict[str, ConvertedStage]:
    """The converted stages of ``model`` by qualified name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ConvertedStage)}
