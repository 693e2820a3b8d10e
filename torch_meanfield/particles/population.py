"""A population: n exchangeable particles and the tensors each of them owns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Stack:
    """Particle ``i`` owns the whole of ``tensors[i]``.

    This is how residual blocks are particles: one stack for each name inside a block.

    Args:
        tensors: n tensors of one shape, dtype and device.

    Raises:
        ValueError: fewer than one tensor, or tensors that differ in shape, dtype or device.
    """

    tensors: tuple[Tensor, ...]

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


@dataclass(frozen=True, eq=False)
class Slice:
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

    def __post_init__(self) -> None:
        if not -self.tensor.ndim <= self.dim < self.tensor.ndim:
            raise ValueError(f"Slice: dim {self.dim} is out of range for a tensor of shape {tuple(self.tensor.shape)}")
        object.__setattr__(self, "dim", self.dim % self.tensor.ndim)
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

    def by_particle(self, tensor: Tensor) -> Tensor:
        """View a tensor laid out like ``self.tensor`` so that dimension ``dim + 1`` counts particles."""
        shape = tensor.shape
        return tensor.view(*shape[: self.dim], self.outer, self.size, self.inner, *shape[self.dim + 1 :])


Column = Stack | Slice


@dataclass(frozen=True, eq=False)
class Population:
    """n exchangeable particles: permuting them, with all that they own, changes no output of the network.

    Args:
        columns: what the particles own, each column one tensor per particle (:class:`Stack`) or one slice per
            particle (:class:`Slice`).
        owner: the module whose function the exchange leaves unchanged; averaged copies are matched to it.
        name: shown in errors, warnings and logs.

    Raises:
        ValueError: no column, columns that disagree about the number of particles, or a tensor held twice.

    Source: exchangeability as in Lu et al. 2020 (Algorithm 1) and Rotskoff 2020, eq. (1).
    """

    columns: tuple[Column, ...]
    owner: nn.Module | None = None
    name: str = "population"

    def __init__(self, columns: Sequence[Column], owner: nn.Module | None = None, name: str = "population") -> None:
        object.__setattr__(self, "columns", tuple(columns))
        object.__setattr__(self, "owner", owner)
        object.__setattr__(self, "name", name)
        if not self.columns:
            raise ValueError(f"{name}: columns is empty; a particle must own at least one tensor")
        seen: set[tuple[int, int]] = set()
        for i, column in enumerate(self.columns):
            tensors = column.tensors if isinstance(column, Stack) else (column.tensor,)
            dim = 0 if isinstance(column, Stack) else column.dim  # tied weights may hold particles along two dimensions
            held = {(id(t), dim) for t in tensors}
            if held & seen or len(held) < len(tensors):
                raise ValueError(
                    f"{name}: column {i} holds a tensor that another particle or column holds already, and that would "
                    f"move twice"
                )
            seen |= held
            if column.size != self.size:
                raise ValueError(
                    f"{name}: column {i} holds {column.size} particles, but column 0 holds {self.size}; every column "
                    f"of a population has one entry for each particle"
                )

    @property
    def size(self) -> int:
        """Number of particles n."""
        return self.columns[0].size

    def within(self, copy: nn.Module) -> Population:
        """The same population inside ``copy``, a module of the owner's structure (an averaged copy, say).

        Raises:
            ValueError: the population has no owner, or ``copy`` lacks a tensor of the owner's name.
        """
        if self.owner is None:
            raise ValueError(f"{self.name}: a population without an owner cannot be found inside another module")
        names = {id(t): n for n, t in named_tensors(self.owner).items()}
        theirs = named_tensors(copy)

        def twin(t: Tensor) -> Tensor:
            name = names.get(id(t))
            if name is None or name not in theirs:
                raise ValueError(
                    f"{self.name}: the copy ({type(copy).__name__}) has no tensor {name or 'outside the owner'!r}; "
                    f"averaged copies must have the structure of the model they follow"
                )
            return theirs[name]

        columns: list[Column] = [
            Stack([twin(t) for t in c.tensors])
            if isinstance(c, Stack)
            else Slice(twin(c.tensor), c.dim, c.outer, c.inner)
            for c in self.columns
        ]
        return Population(columns, owner=copy, name=self.name)


def tensors_of(columns: Iterable[Column]) -> list[Tensor]:
    """Every tensor that a particle owns a part of, or the whole."""
    return [t for c in columns for t in (c.tensors if isinstance(c, Stack) else (c.tensor,))]


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of ``module`` by its qualified name (tied ones under each of their names)."""
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors.update(module.named_buffers(remove_duplicate=False))
    return tensors


def check_index(index: Tensor | Sequence[int], n: int, name: str) -> Tensor:
    """Return ``index`` as an int64 tensor of shape ``(n,)`` after checking it.

    A tensor on an accelerator is not read back (that would wait for the device); its values are then the caller's
    responsibility, and the device itself refuses what is out of range.
    """
    out = index if isinstance(index, Tensor) else torch.tensor(list(index), dtype=torch.int64, device="cpu")
    if out.dtype != torch.int64 or out.shape != (n,):
        raise ValueError(
            f"{name}: index must hold {n} integers (int64), one source for each particle; got {out.dtype} of shape "
            f"{tuple(out.shape)}"
        )
    if out.device.type == "cpu" and n and (int(out.min()) < 0 or int(out.max()) >= n):
        raise ValueError(f"{name}: index must lie in 0..{n - 1}; got values in {int(out.min())}..{int(out.max())}")
    return out
