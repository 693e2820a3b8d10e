"""``populations="auto"``: found with the first input the model sees, and kept where the optimizer trains all of one."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torch_meanfield.width.blocks import Blocks, blocks_of
from torch_meanfield.width.declared import check_disjoint, check_owned, foreign
from torch_meanfield.width.discover import find_populations
from torch_meanfield.width.neurons import Neurons


def discovered(model: nn.Module, example_input: Any, optimizer: Optimizer) -> list[Neurons | Blocks]:
    """The proven populations of ``model`` whose parameters ``optimizer`` owns, and the blocks of mean-field layers.

    Raises:
        ValueError: there is none.
    """
    found: list[Neurons | Blocks] = [*find_populations(model, example_input), *blocks_of(model)]
    kept = [p for p in found if foreign(p, optimizer) is None]
    if not kept:
        raise ValueError(
            f"populations='auto': {type(model).__name__} has {len(found)} proven populations, none of which belongs to "
            f"the optimizer's parameters as a whole; declare populations=[[(weight, 0), ..., (outgoing, 1)], ...]"
        )
    for population in kept:
        check_owned(population, optimizer)
    check_disjoint(kept)
    return kept


class Glimpse:
    """Keeps one example of what ``model`` is called with, from its next call.

    Args:
        model: the module that will be called.
    """

    def __init__(self, model: nn.Module) -> None:
        self.name = type(model).__name__
        self.example: tuple[Any, ...] | None = None
        self._handle: RemovableHandle | None = model.register_forward_pre_hook(_Peek(self))

    def see(self, args: tuple[Any, ...]) -> None:
        """Remember a copy: the caller may reuse the memory."""
        if self.example is None and args:
            self.example = tuple(a.detach()[:2].clone() if isinstance(a, Tensor) and a.ndim else a for a in args)

    def take(self) -> Any:
        """The example, and no hook any more.

        Raises:
            ValueError: the model has not been called.
        """
        if self.example is None:
            raise ValueError(
                f"populations='auto': {self.name} was not called before the first step, so there is no input to find "
                f"its populations with; pass the module that is called as model=, or example_input="
            )
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        return self.example[0] if len(self.example) == 1 else self.example


class _Peek:
    """The hook; a copy of the model gets one that does nothing."""

    def __init__(self, glimpse: Glimpse | None = None) -> None:
        self.glimpse = None if glimpse is None else weakref.ref(glimpse)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        glimpse = None if self.glimpse is None else self.glimpse()
        if glimpse is not None:
            glimpse.see(args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Peek:
        return _Peek()

    def __reduce__(self) -> tuple[type[_Peek], tuple[()]]:
        return _Peek, ()
