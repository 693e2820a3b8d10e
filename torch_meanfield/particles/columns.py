"""Columns: of each particle one tensor, or one slice of a tensor, and how that moves with its particle."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_meanfield.particles.copying import is_sharded, pieces, same_memory, whole, write_


@dataclass(frozen=True, eq=False)
class Route:
    """Where each particle comes from: ``new[i] = old[index[i]]``.

    Attributes:
        index: int64 ``(n,)``.
        places: those i for which ``index[i]`` is another place, if they are known; only they are touched then.
        sources: the index on the host, which whole tensors need to know.
    """

    index: Tensor
    places: Tensor | None = None
    sources: Sequence[int] = ()

    @property
    def moved(self) -> list[tuple[int, int]]:
        """Pairs of a place and another one that it takes from."""
        return [(i, j) for i, j in enumerate(self.sources) if i != j]


class Column(ABC):
    """One part for each particle, of the tensors of one name: :class:`Stack` or :class:`Slice`.

    Attributes:
        tensors: all tensors that hold the parts.
        dim: the dimension of each that counts particles; 0 where a particle owns the whole.
        owns_whole: whether each particle owns a whole tensor, so that it moves from one to another.
    """

    tensors: tuple[Tensor, ...]
    dim: int
    owns_whole: ClassVar[bool]

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of particles n."""

    @abstractmethod
    def on(self, tensors: Tensor | Sequence[Tensor]) -> Column:
        """The same layout over other tensors: gradients, optimizer state, those of a copy of the model."""

    @abstractmethod
    def move_(self, route: Route) -> None:
        """``new[i] = old[index[i]]`` over the values, in place."""

    @abstractmethod
    def move_gradients_(self, route: Route) -> None:
        """Gradients and ``requires_grad`` go with their particle.

        Another optimizer may still have to step on these gradients, and a frozen block stays frozen where it goes.
        """

    @abstractmethod
    def move_state_(self, optimizer: Optimizer, route: Route) -> None:
        """What ``optimizer`` keeps for the tensors goes with the particles (see :func:`.check_state`)."""


@dataclass(frozen=True, eq=False)
class Stack(Column):
    """Particle ``i`` owns the whole of ``tensors[i]``.

    This is how residual blocks are particles: one stack for each name inside a block.

    Args:
        tensors: n tensors of one shape, dtype and device.

    Raises:
        ValueError: fewer than one tensor, or tensors that differ in shape, dtype or device.
    """

    tensors: tuple[Tensor, ...]
    dim = 0
    owns_whole = True

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        object.__setattr__(self, "tensors", tuple(tensors))
        if not self.tensors:
            raise ValueError("Stack: tensors is empty; give one tensor for each particle")
        first = self.tensors[0]
        for i, t in enumerate(self.tensors):
            if (t.shape, t.dtype, t.device) != (first.shape, first.dtype, first.device):
                raise ValueError(
                    f"Stack: tensors[{i}] is {tuple(t.shape)} {t.dtype} on {t.device}, but tensors[0] is "
                    f"{tuple(first.shape)} {first.dtype} on {first.device}; all particles own equal shapes"
                )

    @property
    def size(self) -> int:
        """Number of particles n."""
        return len(self.tensors)

    def on(self, tensors: Tensor | Sequence[Tensor]) -> Stack:
        """See :meth:`Column.on`; one tensor is that of the only particle."""
        return Stack((tensors,) if isinstance(tensors, Tensor) else tensors)

    def move_(self, route: Route) -> None:
        """See :meth:`Column.move_`."""
        old = {j: self.tensors[j].detach().clone() for _, j in route.moved}
        for i, j in route.moved:
            self.tensors[i].detach().copy_(old[j])

    def move_gradients_(self, route: Route) -> None:
        """See :meth:`Column.move_gradients_`."""
        old = {}
        for _, j in route.moved:
            p = self.tensors[j]
            old[j] = (None if p.grad is None else p.grad.detach().clone(), p.requires_grad)
        for i, j in route.moved:
            p, (grad, requires_grad) = self.tensors[i], old[j]
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
            if grad is not None and p.grad is not None and grad.layout == p.grad.layout == torch.strided:
                p.grad.detach().copy_(grad)
            else:  # a sparse gradient cannot be written through a detached one
                p.grad = None if grad is None else grad.clone()

    def move_state_(self, optimizer: Optimizer, route: Route) -> None:
        """See :meth:`Column.move_state_`."""
        old = {
            j: {k: v.clone() if isinstance(v, Tensor) else v for k, v in _kept(optimizer, self.tensors[j]).items()}
            for _, j in route.moved
        }
        for i, j in route.moved:
            p, new = self.tensors[i], old[j]
            if not new:  # lazy optimizers initialise on an absent or empty state: leave none behind
                optimizer.state.pop(p, None)
                continue
            state, kept = optimizer.state[p], _kept(optimizer, p)
            for key in kept.keys() - new.keys():
                del state[key]
            for key, value in new.items():
                here: Any = kept.get(key)
                alike = isinstance(value, Tensor) and isinstance(here, Tensor) and here.shape == value.shape
                if alike and value.layout == here.layout == torch.strided:
                    here.copy_(value)  # in place: captured graphs and sharded optimizers hold on to the storage
                else:
                    state[key] = value.clone() if isinstance(value, Tensor) else value


@dataclass(frozen=True, eq=False)
class Slice(Column):
    """Particle ``i`` owns the i-th slice of ``tensor`` along ``dim``.

    This is how neurons are particles. The dimension is read as ``(outer, n, inner)``: ``inner`` consecutive entries
    belong to one particle (the width of an attention head, the channels of a group, the positions behind a flattened
    channel), and the pattern repeats ``outer`` times (3 for a fused qkv projection, 2 for a packed gate).

    Args:
        tensor: any tensor; its shape along ``dim`` is ``outer * n * inner``.
        dim: the dimension that holds the particles.
        outer: how often the n particles repeat along ``dim``.
        inner: how many consecutive entries one particle owns.

    Raises:
        ValueError: ``dim`` out of range, or a length that ``outer * inner`` does not divide.
    """

    tensor: Tensor
    dim: int = 0
    outer: int = 1
    inner: int = 1
    tensors: tuple[Tensor, ...] = field(init=False, repr=False)
    owns_whole = False

    def __post_init__(self) -> None:
        if not -self.tensor.ndim <= self.dim < self.tensor.ndim:
            raise ValueError(f"Slice: dim {self.dim} is out of range for a tensor of shape {tuple(self.tensor.shape)}")
        object.__setattr__(self, "dim", self.dim % self.tensor.ndim)
        object.__setattr__(self, "tensors", (self.tensor,))
        length = self.tensor.shape[self.dim]
        if self.outer < 1 or self.inner < 1 or length == 0 or length % (self.outer * self.inner):
            raise ValueError(
                f"Slice: dimension {self.dim} has length {length}, which is not outer ({self.outer}) x particles x "
                f"inner ({self.inner})"
            )

    @property
    def size(self) -> int:
        """Number of particles n."""
        return int(self.tensor.shape[self.dim]) // (self.outer * self.inner)

    def on(self, tensors: Tensor | Sequence[Tensor]) -> Slice:
        """See :meth:`Column.on`; one tensor, or a sequence of one."""
        (tensor,) = (tensors,) if isinstance(tensors, Tensor) else tensors
        return Slice(tensor, self.dim, self.outer, self.inner)

    def by_particle(self, tensor: Tensor) -> Tensor:
        """View a tensor laid out like ``self.tensor`` so that dimension ``dim + 1`` counts particles."""
        shape = tensor.shape
        return tensor.view(*shape[: self.dim], self.outer, self.size, self.inner, *shape[self.dim + 1 :])

    def states(self, optimizer: Optimizer) -> list[Slice]:
        """What ``optimizer`` keeps for every entry of the tensor, laid out as this is."""
        kept = _kept(optimizer, self.tensor).values()
        return [self.on(v) for v in kept if isinstance(v, Tensor) and v.shape == self.tensor.shape]

    def move_(self, route: Route) -> None:
        """See :meth:`Column.move_`."""
        # A sharded dimension cannot be indexed in place, so a sharded tensor is gathered and written back.
        view, dim = self.by_particle(whole(self.tensor)), self.dim + 1
        index = route.index.to(view.device)
        places = None if route.places is None else route.places.to(view.device)
        for piece in pieces(view, dim):
            if places is None:
                piece.copy_(piece.index_select(dim, index))
            else:
                piece.index_copy_(dim, places, piece.index_select(dim, index[places]))
        if is_sharded(self.tensor):
            write_(self.tensor, view.flatten(self.dim, self.dim + 2))

    def move_gradients_(self, route: Route) -> None:
        """See :meth:`Column.move_gradients_`."""
        self.change_gradient_(lambda grad: grad.move_(route))

    def change_gradient_(self, change: Callable[[Slice], None]) -> None:
        """Let ``change`` write to the gradient, if there is one, laid out as the tensor is; a sparse one stays so."""
        grad = self.tensor.grad
        if grad is None or grad.layout == torch.strided:
            if grad is not None:
                change(self.on(grad))
            return
        dense = grad.to_dense()
        change(self.on(dense))
        self.tensor.grad = dense.to_sparse(layout=grad.layout)

    def move_state_(self, optimizer: Optimizer, route: Route) -> None:
        """See :meth:`Column.move_state_`."""
        for kept in self.states(optimizer):
            kept.move_(route)


def _kept(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """What ``optimizer`` keeps for ``parameter``, but for what lies in the parameter's memory and moves with it.

    Sharpness-aware optimizers put a tensor of their state in the parameter's place (``p.data = state["old_p"]``).
    """
    state = optimizer.state[parameter] if parameter in optimizer.state else {}
    return {k: v for k, v in state.items() if not (isinstance(v, Tensor) and same_memory(v, parameter))}
