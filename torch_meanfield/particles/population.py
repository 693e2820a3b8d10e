"""A population: n exchangeable particles and the tensors each of them owns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_meanfield.particles.columns import Column as Column
from torch_meanfield.particles.columns import Slice as Slice
from torch_meanfield.particles.columns import Stack as Stack
from torch_meanfield.particles.traits import Traits


@dataclass(frozen=True, eq=False)
class Population:
    """n exchangeable particles: permuting them, with all that they own, changes no output of the network.

    Args:
        columns: what the particles own, each column one tensor per particle (:class:`Stack`) or one slice per
            particle (:class:`Slice`).
        owner: the module whose function the exchange leaves unchanged; averaged copies are matched to it.
        name: shown in errors, warnings and logs.
        traits: what their modules hold beside tensors, where a particle is made of modules.

    Raises:
        ValueError: no column, columns that disagree about the number of particles, or a tensor held twice.

    Source: exchangeability as in Lu et al. 2020 (Algorithm 1) and Rotskoff 2020, eq. (1).
    """

    columns: tuple[Column, ...]
    owner: nn.Module | None = None
    name: str = "population"
    traits: Traits | None = None

    def __init__(
        self,
        columns: Sequence[Column],
        owner: nn.Module | None = None,
        name: str = "population",
        traits: Traits | None = None,
    ) -> None:
        object.__setattr__(self, "columns", tuple(columns))
        object.__setattr__(self, "owner", owner)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "traits", traits)
        if not self.columns:
            raise ValueError(f"{name}: columns is empty; a particle must own at least one tensor")
        seen: set[tuple[int, int]] = set()
        for i, column in enumerate(self.columns):
            held = {(id(t), column.dim) for t in column.tensors}  # a tied weight may hold particles along two
            if held & seen or len(held) < len(column.tensors):
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
            raise ValueError(
                f"{self.name}: a population without an owner cannot be found inside another module; make it with "
                f"owner=, the module that holds its tensors"
            )
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

        columns = [c.on([twin(t) for t in c.tensors]) for c in self.columns]
        return Population(columns, owner=copy, name=self.name)


def tensors_of(columns: Iterable[Column]) -> list[Tensor]:
    """Every tensor that a particle owns a part of, or the whole."""
    return [t for c in columns for t in c.tensors]


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of ``module`` by its qualified name (tied ones under each of their names)."""
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors.update(module.named_buffers(remove_duplicate=False))
    return tensors


def homes(model: nn.Module) -> dict[int, nn.Module]:
    """The module of ``model`` that holds each parameter and buffer, by the tensor's ``id``; of several, the last."""
    return {id(t): m for m in model.modules() for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))}


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
