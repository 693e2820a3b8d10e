"""``populations="auto"``: found with the first input the model sees, and kept where the optimizer trains all of one."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torch_meanfield.observe import anew, map_tensors, private_copy, run, tensors_in, undisturbed
from torch_meanfield.particles.copying import is_sharded
from torch_meanfield.particles.neurons import Neurons
from torch_meanfield.width.optimizer.declared import check_disjoint, check_owned, foreign
from torch_meanfield.width.optimizer.first_batches import FirstBatches
from torch_meanfield.width.search.find import find_populations
from torch_meanfield.width.search.reparametrised import Reparametrised
from torch_meanfield.width.turnover.blocks import Blocks, blocks_of


def discovered(
    model: nn.Module, example_input: Any, optimizer: Optimizer, *, shorten: bool = False
) -> list[Neurons | Blocks]:
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
        report = find_populations(model, shortened(model, example_input) if shorten else example_input)
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


def shortened(model: nn.Module, example_input: Any) -> Any:
    """The first two samples of ``example_input`` where the model treats samples one by one; else all of it.

    That is so if the outputs on the two are the first two rows of the outputs on all. Not so of the nodes of a graph,
    of a sequence that comes first, or of a mask for all samples.
    """
    tensors = [t for t in tensors_in(example_input) if t.ndim]
    count = len(tensors[0]) if tensors else 0
    if count <= 2:
        return example_input
    few = map_tensors(lambda t: t[:2].clone() if t.ndim and len(t) == count else t, example_input)
    try:
        copy = private_copy(model, share_parameters=True)
        with undisturbed():
            parts, wholes = (tensors_in(run(copy, anew(Tensor.clone, given))) for given in (few, example_input))
    except Exception:  # it cannot be cut; what else is wrong with the model is said by the search
        return example_input
    rows = [(part, whole[:2]) for part, whole in zip(parts, wholes, strict=False) if whole.ndim and len(whole) == count]
    alike = len(parts) == len(wholes) and bool(rows) and all(_alike(*pair) for pair in rows)
    return few if alike else example_input


def _alike(part: Tensor, whole: Tensor) -> bool:
    if part.shape != whole.shape:
        return False
    part, whole = part.double(), whole.double()
    size = whole.abs().amax() if whole.numel() else whole.sum()
    return bool(((part - whole).abs() <= 1e-2 * size).all())  # other kernels, in half precision


class Glimpse:
    """Keeps one example of what ``model`` is called with, from its next call, and counts the samples until it is taken.

    Args:
        model: the module that will be called.
    """

    def __init__(self, model: nn.Module) -> None:
        self.name, self._forward = type(model).__name__, model.forward
        self._given: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.batches = FirstBatches(model)
        self._handle: RemovableHandle | None = model.register_forward_pre_hook(_Peek(self), with_kwargs=True)

    def see(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember a copy: the caller may reuse the memory."""
        self.batches.see((args, kwargs))
        if self._given is not None or not (args or kwargs):
            return
        if torch.compiler.is_compiling():  # which can follow this
            self._given = tuple(_copied(a) for a in args), {name: _copied(a) for name, a in kwargs.items()}
        else:
            self._given = anew(_copied, (args, kwargs))

    def forget_step(self) -> None:
        """The gradients of the present step are thrown away."""
        self.batches.forget()

    def take(self) -> Any:
        """The example, and no hook any more.

        Raises:
            ValueError: the model has not been called.
        """
        if self._given is None:
            raise ValueError(
                f"populations='auto': {self.name} was not called before the first step, so there is no input to find "
                f"its populations with; pass the module that is called as model=, or example_input="
            )
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self.batches.stop()
        args, kwargs = self._given
        if args and kwargs:
            return signature(self._forward).bind(*args, **kwargs)
        return kwargs or (args[0] if len(args) == 1 and not isinstance(args[0], (tuple, Mapping)) else args)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


class _Peek:
    """The hook; a copy of the model gets one that does nothing."""

    def __init__(self, glimpse: Glimpse | None = None) -> None:
        self.glimpse = None if glimpse is None else weakref.ref(glimpse)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        glimpse = None if self.glimpse is None else self.glimpse()
        if glimpse is not None:
            glimpse.see(args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Peek:
        return _Peek()

    def __reduce__(self) -> tuple[type[_Peek], tuple[()]]:
        return _Peek, ()
