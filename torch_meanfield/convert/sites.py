"""Where the step is applied: parameters of a module are seen multiplied by it while the module's own forward runs.

A :class:`Site` stands in for the ``forward`` of one module, as an attribute of that module: its class, and outside of
``forward`` every attribute, are what they always were. The stage owns the :class:`Place` and sees at each event that
whatever module stands there now has a site.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_meanfield._torch import children_of, is_batch_norm, parameters_of
from torch_meanfield.depth.euler import is_plain, scaled_by
from torch_meanfield.observe import map_tensors

# The weight that reads a scaled tensor inside a gate is divided by the step, which may be 0. Below this the gate sees
# a smaller input, of a branch whose share in the update is less than this.
LEAST_DIVISOR = 2.0**-10

WAY_OUT = "fold(model) before a tool changes its layers, or convert the model that the tool has made"


@dataclass(eq=False)
class Place:
    """Where in a block the step of its particle acts, whatever module stands there.

    Attributes:
        slot, member: the slot of the particle, and which of its blocks.
        path: qualified name inside the block; empty for the block itself.
        kind: the class of the module when it was converted.
        scaled: for each parameter the path of its owner inside the module, its name there, and the power of the step.
        whole: whether the module's output, multiplied, is what the scaled parameters give.
        output: whether the output is multiplied in any case, for a branch that no parameter scales.
        carried: likewise for each parameter that makes up for a constant of the place, with the constants of all.
        inside: where the block is entered, all of its places, which the stage looks after then; else ``None``.
        turn: counts the sites that have stood here; only the newest acts.
    """

    slot: int
    member: int
    path: str
    kind: type[nn.Module]
    scaled: tuple[tuple[str, str, int], ...] = ()
    whole: bool = False
    output: bool = False
    carried: tuple[tuple[str, str, tuple[float, ...]], ...] = ()
    inside: tuple[Place, ...] | None = None
    turn: int = 0

    @property
    def acts(self) -> bool:
        """Whether anything is multiplied here."""
        return bool(self.scaled or self.output or self.carried)

    def takes(self, module: nn.Module) -> bool:
        """Whether ``module`` is plainly the layer that was converted, and holds the parameters that take the step."""
        kind = type(module)
        if kind.forward is not self.kind.forward and not (is_batch_norm(kind) and is_batch_norm(self.kind)):
            return False
        owners = [(descend(module, path), name) for path, name, _ in (*self.scaled, *self.carried)]
        return all(o is not None and parameters_of(o).get(name) is not None for o, name in owners)

    def plain(self, module: nn.Module) -> bool:
        """Whether the parameters that ``module`` takes the step by are plain real tensors."""
        return all(is_plain(parameters_of(descend(module, path))[name]) for path, name, _ in self.scaled)

    def changed(self, module: nn.Module | None) -> str:
        """What has become of the module, for an error."""
        what = "is gone" if module is None else f"is a {type(module).__name__} now, not the {self.kind.__name__} it was"
        if module is not None and type(module) is self.kind:
            what = f"({self.kind.__name__}) holds its parameters in another way now"
        return f"{self.path or 'the block itself'!r} of a block in slot {self.slot} {what}"


class Site:
    """The ``forward`` of one module at a :class:`Place`; held in the module's ``__dict__`` and copied with it.

    Args:
        stage: whose tau gives the step (not registered: it is a child of another module).
        place: where the module stands.
    """

    def __init__(self, stage: Any, place: Place) -> None:
        self.stage, self.place, self.turn = stage, place, place.turn
        self.module: Any = None  # a weak reference: a module that holds itself is not freed at once
        self.under: Any = None  # the forward that the module's user had given it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, or the block of the particle whose turn it is."""
        if self.place.inside is not None:
            return self.stage.enter_(self).run(*args, **kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass with its scaled parameters."""
        module, place = self.module(), self.place
        if module is None:
            raise RuntimeError(f"{place.changed(None)}: only its forward was kept; {WAY_OUT}")
        forward = partial(type(module).forward, module) if self.under is None else self.under
        if not self.acts:
            return forward(*args, **kwargs)
        step = self.stage.step(place.slot)
        takes = not place.output and place.takes(module)
        if place.output or (place.whole and not (takes and self.under is None and place.plain(module))):
            return _scaled(forward(*args, **kwargs), step)
        if not takes:
            raise RuntimeError(f"{place.changed(module)}, and its step acts on nothing; {WAY_OUT}")
        kept: list[tuple[dict[str, Any], str, Tensor]] = []
        try:
            for path, name, by in self.factors(step):
                parameters: dict[str, Any] = parameters_of(descend(module, path))
                kept.append((parameters, name, parameters[name]))
                # As torch.func.functional_call does it, and torch.compile can follow.
                parameters[name] = scaled_by(parameters[name], by)
            return forward(*args, **kwargs)
        finally:
            for parameters, name, parameter in reversed(kept):
                parameters[name] = parameter

    def factors(self, step: Tensor) -> Iterator[tuple[str, str, Tensor]]:
        """What each parameter is multiplied by: the path of its owner, its name, and the factor."""
        for path, name, power in self.place.scaled:
            yield path, name, factor(step, power)
        for path, name, table in self.place.carried:
            yield path, name, self.stage.carried.factor(self.place.slot, table)

    @property
    def acts(self) -> bool:
        """Whether a step acts: not where a block is merely entered, nor inside what has taken the layer's place."""
        return self.turn == self.place.turn and self.place.acts

    @property
    def __globals__(self) -> dict[str, Any]:  # what torch.jit.script asks a forward for
        raise AttributeError(
            "a step scales this layer when it runs, which torch.jit.script cannot see; fold(model) first"
        )

    @property
    def __signature__(self) -> inspect.Signature:
        module = self.module()
        return inspect.signature(self.under or partial(type(module).forward, module))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "module": self.module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, module=weakref.ref(state["module"]))


def factor(step: Tensor, power: int) -> Tensor:
    """``step ** power`` for a power of 1 or -1, the divisor kept from 0."""
    return step if power == 1 else 1 / step.clamp(min=LEAST_DIVISOR)


def _scaled(out: Any, by: Tensor) -> Any:
    if isinstance(out, Tensor):
        return scaled_by(out, by)
    if type(out) not in (tuple, list):
        raise TypeError(f"a step cannot scale a {type(out).__name__} that a layer of a block returns; {WAY_OUT}")
    return map_tensors(partial(scaled_by, step=by), out)


def descend(module: Any, path: str) -> Any:
    """The module at ``path`` inside ``module``, or ``None``."""
    for name in path.split(".") if path else ():
        module = None if module is None else children_of(module).get(name)
    return module


def attach(module: nn.Module, site: Site) -> None:
    """Let ``module`` run through ``site``.

    Raises:
        TypeError: a module that does not run in Python (a scripted one).
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"a step cannot act on a scripted module ({type(module).__name__}); convert before torch.jit.script, or "
            f"leave its block out (exclude=)"
        )
    under = module.__dict__.get("forward")
    while isinstance(under, Site):  # of the copy of a stage that came with the copy of a layer
        under = under.under
    site.module, site.under = weakref.ref(module), under
    module.__dict__["forward"] = site


def detach(module: nn.Module) -> None:
    """Undo :func:`attach`."""
    under = module.__dict__.pop("forward").under
    if under is not None:
        module.__dict__["forward"] = under


def site_of(module: nn.Module) -> Site | None:
    """The site of ``module``, if it has one."""
    site = module.__dict__.get("forward")
    return site if type(site) is Site else None


@contextmanager
def attached(sites: dict[nn.Module, Site]) -> Iterator[None]:
    """:func:`attach` all sites while the context lasts."""
    done = []
    try:
        for module, site in sites.items():
            attach(module, site)
            done.append(module)
        yield
    finally:
        for module in done:
            detach(module)
