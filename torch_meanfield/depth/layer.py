"""What every population of residual blocks has: particles on a tau axis, sorted, loaded, copied, averaged alike."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_meanfield._torch import buffers_of, children_of, parameters_of
from torch_meanfield.depth import resample
from torch_meanfield.depth.after_step import register
from torch_meanfield.depth.sorting import sort_
from torch_meanfield.depth.tau_axis import (
    TauAxis,
    check_positions,
    check_tau_entries,
    differences,
    plain_value,
    projected,
)
from torch_meanfield.particles import Population
from torch_meanfield.particles.averages import lineage_of
from torch_meanfield.particles.loading import loaded_whole
from torch_meanfield.particles.population import tensors_of
from torch_meanfield.particles.transport import check_transportable


class MeanFieldLayer(nn.Module):
    """Base of the modules that hold particles ``(theta_i, tau_i)`` in depth (Lu et al. 2020, eq. (15)).

    A subclass says which tensors a particle owns (:meth:`population`) and applies the steps; positions, re-sorting,
    checkpoints, copies and averages are the same for all.

    Attributes:
        tau_axis: the positions by slot.
        horizon: the last time T of the grid on which the particles were placed.
        auto_resort: whether an optimizer step re-sorts this layer.
    """

    tau_axis: TauAxis

    def __init__(self) -> None:
        super().__init__()
        self.horizon = 0.0
        self.auto_resort = True

    def _place_on_axis(self, n: int, horizon: float, first: Tensor | None, *, learn: bool = True) -> None:
        """Make the tau axis (after the branches are registered), on the device of ``first`` and as precise."""
        double = first is not None and first.dtype == torch.float64
        self.tau_axis = TauAxis(
            n,
            horizon,
            learn=learn,
            device=None if first is None else first.device,
            dtype=torch.float64 if double else torch.float32,
        )
        self.horizon = horizon
        cast(Any, self).register_load_state_dict_post_hook(_after_load)
        lineage_of(self)
        register(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        cast(Any, super()).__setstate__(state)  # copies and unpickled layers come this way, past __init__
        lineage_of(self)
        register(self)

    @property
    def tau(self) -> Tensor:
        """The n positions, ascending and differentiable; shape ``(n,)``, float32 (float64 in a double model)."""
        return projected(self.tau_axis.positions()).sort(stable=True).values

    def steps(self) -> Tensor:
        """The n step sizes ``tau^l - tau^{l-1}`` with tau^0 = 0, differentiable; shape and dtype of ``tau``."""
        return differences(self.tau)

    def set_tau_(self, values: Tensor | Sequence[float]) -> MeanFieldLayer:
        """Place the particles and re-sort: branch i goes to ``values[i]``, then all take the order of tau.

        Optimizer state moves along for every optimizer that has stepped.

        Args:
            values: n finite positions (times); those below 0 are projected to 0, equal ones keep their order.

        Raises:
            ValueError: not n values, a value that is not finite, or a branch that would move to where the optimizer
                that trains it holds no parameters.
            TypeError: an optimizer keeps state that cannot be divided among the branches. Nothing has changed then.
        """
        tau = check_positions(values, self.tau_axis)
        check_transportable(self.population(), tau.argsort(stable=True).tolist())
        self.tau_axis.place_(tau)
        sort_(self, cause="set_tau")
        return self

    def draw_tau_(self, generator: torch.Generator | None = None) -> MeanFieldLayer:
        """Place the particles at n sorted draws from U(0, horizon); so does a later reset, as after the meta device."""
        self.tau_axis.random = True
        anchor = self.tau_axis.anchor
        if anchor.is_meta:
            return self
        device = "cpu" if generator is None else generator.device
        draws = torch.rand(len(self), generator=generator, dtype=anchor.dtype, device=device) * self.horizon
        return self.set_tau_(draws.sort().values)

    def position(self) -> nn.Parameter | None:
        """The parameter that the optimizer moves the particles by; ``None`` with ``learn_tau=False``."""
        return self.tau_axis.offset

    def potential(self) -> Tensor | None:
        """Of every branch, its step size times the loss's derivative by it, shape ``(n,)``; see :mod:`.resample`."""
        return resample.potential(self)

    def resample_(self, index: Tensor, optimizers: Iterable[Optimizer] = (), cause: str = "birth_death") -> Tensor:
        """Let branches die and be cloned at a fixed number, their intervals re-divided; see :mod:`.resample`."""
        return resample.resample_(self, index, optimizers, cause)

    def check_untied(self, model: nn.Module) -> None:
        """See that no module of ``model`` but the particles' own uses what they own.

        A tensor stays where it is when particles change places, and holds another one's values then.

        Raises:
            ValueError: another module holds a tensor of a branch, or a part of one; it is named.
        """
        slots = [(slot,) if isinstance(slot, nn.Module) else slot for slot in self]
        blocks = [m for slot in slots for m in slot]
        inside = {id(m) for block in (self, *blocks) for m in block.modules()}
        if len(slots) > 1:  # what all blocks share belongs to none
            each = [{id(m) for block in slot for m in block.modules()} for slot in slots]
            inside -= each[0].intersection(*each[1:])
        owned = {id(t) for t in tensors_of(self.population().columns)}
        # a converted stage is not the parent of its blocks
        entrances = {id(self)} if id(blocks[0]) in {id(m) for m in self.modules()} else {id(self), *map(id, blocks)}
        for name, module in model.named_modules():
            if id(module) in inside:
                continue
            parts: tuple[tuple[str, Any], ...] = (*parameters_of(module).items(), *buffers_of(module).items())
            tied = [key for key, tensor in parts if tensor is not None and id(tensor) in owned]
            tied += [k for k, m in children_of(module).items() if id(m) in inside and id(m) not in entrances]
            if tied:
                raise ValueError(
                    f"{self._label()}: {name + '.' if name else ''}{tied[0]} belongs to one of its branches; when "
                    f"branches change places its values go with the branch. Give the other module one of its own, or "
                    f"keep the branch out of the layer"
                )

    def __prepare_scriptable__(self) -> None:
        raise TypeError(
            f"{self._label()}: torch.jit.script cannot follow the order of the blocks, which is read at run time; "
            f"torch.jit.trace and torch.export can, and fold(model) gives a plain copy of a converted model"
        )

    def check_held_(self) -> None:
        """See that the steps act on all branches: a layer whose branches lie elsewhere overrides this."""

    def _execution_order(self) -> list[int] | None:
        """Slots in the order of tau, or ``None`` where they are in it already.

        The re-sorting behind every optimizer step keeps them so, and nothing is read from an accelerator then. They
        can be out of order after tau was written by hand, with automatic re-sorting off, and in averaged copies. Under
        ``vmap`` no value can be read, and the slots are taken to be sorted.
        """
        # An average's tau may cross while its places follow the model's, and averages are swapped in unseen.
        averaged = not self.training and lineage_of(self).averaged
        if torch.compiler.is_compiling():
            return self._read_order() if averaged else None  # breaks the graph, and says so under fullgraph
        return None if self.tau_axis.in_order() and not averaged else self._read_order()

    def _read_order(self) -> list[int] | None:
        positions = plain_value(self.tau_axis.read())
        if positions is None:
            return None
        # item by item: tolist() fails inside the function transforms of torch 2.6
        order = [int(i) for i in positions.clamp(min=0).argsort(stable=True).cpu()]
        if order == list(range(len(order))) and not bool((positions < 0).any()):
            self.tau_axis.mark_sorted()
            return None
        return order

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """The branch, or the blocks, in each slot."""

    @abstractmethod
    def population(self) -> Population:
        """The branches as particles, each with its place on the tau axis."""

    @abstractmethod
    def take_out_(self, size: int, undo: ExitStack) -> None:
        """Hold the particles of the first ``size`` slots only: their places on the tau axis are cut already."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of particles n."""

    def extra_repr(self) -> str:
        """Horizon."""
        return f"horizon={self.horizon:g}"

    def _label(self) -> str:
        name = lineage_of(self).name
        return f"{type(self).__name__}{f' {name!r}' if name else ''} ({len(self)} branches)"

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a checkpoint whole or not at all; particles whose tau is not sorted are sorted.

        Raises:
            TypeError, RuntimeError: as :func:`~torch_meanfield.particles.load_whole_`.
            ValueError: a tau that is not finite. The layer is unchanged then.
        """
        load = super().load_state_dict
        return loaded_whole(self, state_dict, lambda: load(state_dict, strict=strict, assign=assign))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        check_tau_entries(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _loaded(self, incompatible_keys: Any) -> None:
        """Called when this layer has been loaded: an averaged copy keeps the places of the model it follows."""
        self.tau_axis.keep_exact_()
        if not lineage_of(self).following:
            sort_(self, cause="load")


def _after_load(layer: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(layer, MeanFieldLayer)
    layer._loaded(incompatible_keys)
