"""Where the step is applied: parameters of a module are seen multiplied by it while the module's own forward runs.

The module's class becomes a subclass that only wraps ``forward`` (as ``torch.nn.utils.parametrize`` does with
properties). Outside of ``forward`` every attribute is what it always was: ``module.weight`` is the parameter itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from torch_meanfield._torch import children_of, parameters_of
from torch_meanfield.convert.stage import ConvertedStage

# The weight that reads a scaled tensor inside a gate is divided by the step, which may be 0. Below this the gate sees
# a smaller input, of a branch whose share in the update is less than this.
LEAST_DIVISOR = 2.0**-10

_KEY = "_mean_field_site"


class Site:
    """What one module scales during its forward pass; kept in the module's ``__dict__`` and copied with it.

    Attributes:
        stage: the stage whose tau gives the step (not registered: it is a child of another module).
        slot: the slot of the particle that the module belongs to.
        scaled: for each parameter the path of its owner inside the module, its name there, and the power of the step.
        output: whether the output itself is multiplied, for a branch that no parameter scales.
    """

    def __init__(
        self,
        stage: ConvertedStage,
        slot: int,
        scaled: tuple[tuple[str, str, int], ...] = (),
        *,
        output: bool = False,
    ) -> None:
        self.stage, self.slot, self.scaled, self.output = stage, slot, scaled, output

    def owned(self, module: nn.Module) -> list[tuple[nn.Module, str, int]]:
        """Owner, name and power of each parameter scaled in ``module``."""
        return [(_descend(module, path), name, power) for path, name, power in self.scaled]


def factor(step: Tensor, power: int) -> Tensor:
    """``step ** power`` for a power of 1 or -1, the divisor kept from 0."""
    return step if power == 1 else 1 / step.clamp(min=LEAST_DIVISOR)


def multiply(tensor: Tensor, by: Tensor) -> Tensor:
    """``tensor * by``, computed in the precision of ``by`` and rounded once to that of ``tensor``."""
    return tensor * by if tensor.dtype == by.dtype else (tensor.to(by.dtype) * by).to(tensor.dtype)


QUANTISED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # by torch.ao.quantization, other layers as they are


class StepScaled:
    """Mixed into the class of a module with a :class:`Site`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass with its scaled parameters."""
        site: Site = self.__dict__[_KEY]
        if self.__dict__.get("qconfig") is not None and isinstance(self, QUANTISED):
            raise TypeError(
                f"a {type(self).__name__} of a converted block has a qconfig, but prepare_qat does not know a layer "
                f"whose weights a step scales, and has left it as it was; fold(model) first"
            )
        step = site.stage.step(site.slot)
        kept: list[tuple[dict[str, Any], str, Tensor]] = []
        try:
            for path, name, power in site.scaled:
                parameters: dict[str, Any] = parameters_of(_descend(self, path))
                kept.append((parameters, name, parameters[name]))
                # As torch.func.functional_call does it, and torch.compile can follow.
                parameters[name] = multiply(parameters[name], factor(step, power))
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            for parameters, name, parameter in kept:
                parameters[name] = parameter
        return multiply(out, step) if site.output else out

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _new, (type(self).__mro__[2],), state


def _descend(module: Any, path: str) -> Any:
    for name in path.split(".") if path else ():
        module = children_of(module)[name]
    return module


_scaled_classes: dict[type, type] = {}


def _scaled_class(cls: type) -> type:
    """The subclass of ``cls`` that scales; it has the same name."""
    if cls not in _scaled_classes:
        body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        _scaled_classes[cls] = type(cls.__name__, (StepScaled, cls), body)
    return _scaled_classes[cls]


def _new(cls: type) -> Any:
    scaled: Any = _scaled_class(cls)
    return scaled.__new__(scaled)


def attach(module: nn.Module, site: Site) -> None:
    """Let ``module`` scale as ``site`` says.

    Raises:
        TypeError: a module whose class cannot be derived from (a scripted module).
    """
    scaled = _scaled_class(type(module))
    module.__class__ = scaled
    module.__dict__[_KEY] = site


def detach(module: nn.Module) -> None:
    """Undo :func:`attach`."""
    del module.__dict__[_KEY]
    module.__class__ = type(module).__mro__[2]


def site_of(module: nn.Module) -> Site | None:
    """The site of ``module``, if it has one."""
    return module.__dict__.get(_KEY)


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
