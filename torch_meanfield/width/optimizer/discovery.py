"""``populations="auto"``: found with the first input the model sees, and kept where the optimizer trains all of one."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torch_meanfield.particles.copying import is_sharded
from torch_meanfield.particles.neurons import Neurons
from torch_meanfield.width.optimizer.declared import check_disjoint, check_owned, foreign
from torch_meanfield.width.optimizer.first_batches import FirstBatches
from torch_meanfield.width.search.find import find_populations
from torch_meanfield.width.search.reparametrised import Reparametrised
from torch_meanfield.width.turnover.blocks import Blocks, blocks_of


def discovered(model: nn.Module, example_input: Any, optimizer: Optimizer) -> list[Neurons | Blocks]:
    """The proven populations of ``model`` whose parameters ``optimizer`` owns, and the blocks of mean-field layers.

    Units whose weights are computed from other tensors in such a way that a birth would change other units (spectral
    normalisation, fake quantisers) are left out with a warning that names them.

    Raises:
        ValueError: there is none, a block shares a tensor with another module, or the model is sharded.
    """
    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError(
            f"populations='auto': {type(model).__name__} is sharded, and the search works on a copy, which FSDP2 does "
            f"not allow; call find_populations(model, example) before fully_shard(model), and declare what it found by "
            f"the sharded parameters: populations=[[(weight, 0), ..., (outgoing, 1)], ...]"
        )
    computed = Reparametrised(model)
    left_out: list[str] = []
    refused: list[str] = []
    neurons: list[Neurons] = []
    if computed.quantiser is not None:
        left_out.append(f"all neurons: {computed.quantiser} rounds by a scale that units share")
    else:
        report = find_populations(model, example_input)
        refused = [str(r) for r in report.refused]
        for units in report:
            reason = computed.entangled(units)
            if reason is None:
                neurons.append(units)
            else:
                left_out.append(f"{units.name} ({units.size} units): {reason}")
    found: list[Neurons | Blocks] = [*neurons, *blocks_of(model)]
    kept = [p for p in found if foreign(p, optimizer) is None]
    if not kept:
        none = "none of which belongs to the optimizer's parameters as a whole" if found else "so nothing can be born"
        because = "; ".join(left_out + refused)
        raise ValueError(
            f"populations='auto': {type(model).__name__} has {len(found)} proven populations, {none}; declare "
            f"populations=[[(weight, 0), ..., (outgoing, 1)], ...]{'. Left out: ' if because else ''}{because}"
        )
    if left_out:
        warnings.warn(
            f"populations='auto' leaves out, that is, trains without replacing a unit: {'; '.join(left_out)}",
            stacklevel=4,
        )
    for population in kept:
        check_owned(population, optimizer)
        if isinstance(population, Blocks):
            population.layer.check_untied(model)
    check_disjoint(kept)
    return kept


class Glimpse:
    """Keeps one example of what ``model`` is called with, from its next call, and counts the samples until it is taken.

    Args:
        model: the module that will be called.
    """

    def __init__(self, model: nn.Module) -> None:
        self.name = type(model).__name__
        self.example: tuple[Any, ...] | None = None
        self.batches = FirstBatches(model)
        self._handle: RemovableHandle | None = model.register_forward_pre_hook(_Peek(self))

    def see(self, args: tuple[Any, ...]) -> None:
        """Remember a copy: the caller may reuse the memory."""
        self.batches.see(args)
        if self.example is None and args:
            self.example = tuple(a.detach()[:2].clone() if isinstance(a, Tensor) and a.ndim else a for a in args)

    def forget_step(self) -> None:
        """The gradients of the present step are thrown away."""
        self.batches.forget()

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
        self.batches.stop()
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
