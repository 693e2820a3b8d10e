"""The tensors a model holds now: ``model.to(...)`` puts new buffers in place of the old, loading may replace both."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from torch_meanfield.particles import Slice
from torch_meanfield.particles.neurons import Neurons
from torch_meanfield.particles.population import named_tensors
from torch_meanfield.width.turnover.blocks import Blocks

Names = tuple["str | None", ...]


def names_of(populations: Sequence[Neurons | Blocks]) -> list[Names]:
    """The name of every column's tensor in its population's owner; nothing for blocks, which name their own."""
    held = _by_owner(populations)
    names = {owner: {id(t): name for name, t in tensors.items()} for owner, tensors in held.items()}
    return [
        tuple(names[id(p.owner)].get(id(c.tensor)) for c in p.slices(p.columns))
        if isinstance(p, Neurons) and p.owner is not None
        else ()
        for p in populations
    ]


def renewed(populations: Sequence[Neurons | Blocks], names: Sequence[Names]) -> list[Neurons | Blocks]:
    """``populations`` with the buffers that their owners hold now under the same names.

    Raises:
        ValueError: a parameter was replaced, so that the optimizer holds another than the model, or removed.
    """
    held = _by_owner(populations)
    out: list[Neurons | Blocks] = []
    for population, known in zip(populations, names, strict=True):
        if isinstance(population, Blocks) or not known:
            out.append(population)
            continue
        theirs = held[id(population.owner)]
        columns: list[Slice] = []
        for column, name in zip(population.slices(population.columns), known, strict=True):
            now = column.tensor if name is None else theirs.get(name)
            if now is column.tensor:
                columns.append(column)
                continue
            if now is None or isinstance(column.tensor, nn.Parameter) or now.shape != column.tensor.shape:
                raise ValueError(
                    f"{population.name}: {name!r} is no longer the tensor that the optimizer trains: it was replaced "
                    f"(by load_state_dict(assign=True), say) or removed (by a parametrization): make the optimizer and "
                    f"BirthDeathOptimizer after that; or it is gathered by FSDP2 since a forward pass without a "
                    f"backward pass: call reshard()"
                )
            columns.append(Slice(now, column.dim, column.outer, column.inner))
        same = all(a is b for a, b in zip(columns, population.columns, strict=True))
        out.append(population if same else Neurons(columns, population.roles, population.owner, population.name))
    return out


def _by_owner(populations: Sequence[Neurons | Blocks]) -> dict[int, dict[str, Tensor]]:
    owners = {id(p.owner): p.owner for p in populations if isinstance(p, Neurons) and p.owner is not None}
    return {key: named_tensors(owner) for key, owner in owners.items()}
