"""From united labels to candidates: every tensor dimension that one kind of units owns, as slices with roles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_meanfield.particles import Slice
from torch_meanfield.particles.neurons import Neurons
from torch_meanfield.particles.population import named_tensors
from torch_meanfield.width.search.labels import OUTPUT, Ledger, united

Place = tuple[str, int]  # a tensor's name and one of its dimensions


@dataclass(frozen=True)
class Refused:
    """A candidate that is not a population.

    Attributes:
        name: the tensor that would make its units.
        reason: why not, as a phrase.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


STREAM = "is the residual stream: added to what it was computed from"


def candidates(ledger: Ledger, model: nn.Module) -> tuple[list[Neurons], list[Refused]]:
    """The populations that the labels propose, none proven yet, and the families of units that cannot be one.

    Args:
        ledger: what :func:`torch_meanfield.width.search.follow.propagate` returned for ``model`` or a copy of it.
        model: the owner of the populations.
    """
    tensors = named_tensors(model)
    classes = ledger.classes()
    emitted, consumed = _flags(ledger.emitted, ledger.count), _flags(ledger.consumed, ledger.count)
    reasons: dict[int, str] = {}
    for labels, reason in reversed(ledger.frozen):  # the first reason stays
        reasons.update(dict.fromkeys(torch.unique(classes[labels[labels != 0]]).tolist(), reason))
    reasons.update(dict.fromkeys(ledger.streams(), STREAM))
    made_by_layer = set(torch.unique(classes[emitted]).tolist())
    found: list[Neurons] = []
    refused: list[Refused] = []
    for places in _families(ledger, classes):
        vectors = {p: classes[_labels(ledger, p)] for p in places}
        raw = {p: _labels(ledger, p) for p in places}
        roles = {p: "out" if consumed[raw[p]].any() else "in" if emitted[raw[p]].any() else "own" for p in places}
        makers = [p for p in places if roles[p] == "in"]
        if not makers:
            continue
        name = next((p[0] for p in makers if ledger.tensors[p[0]].ndim > 1), makers[0][0])
        units = torch.unique(torch.cat(list(vectors.values()))).tolist()
        why: str | None = next((reasons[u] for u in units if u in reasons), None)
        if "out" not in roles.values():
            if why not in (None, OUTPUT):
                refused.append(Refused(name, str(why)))
            continue
        if why is None and not made_by_layer.issuperset(units):
            why = "holds channels that no layer makes"
        if why is None and len(units) < 2:
            why = "is one block: nothing to exchange"
        columns = None if why else _columns(tensors, vectors, len(units))
        if columns is None and why is None:
            vectors = _tied(vectors)
            n = len(torch.unique(torch.cat(list(vectors.values()))))
            columns = _columns(tensors, vectors, n) if 1 < n < len(units) else None
        if columns is None:
            refused.append(Refused(name, why or "is laid out irregularly: one tensor holds only part of the units"))
        else:
            found.append(Neurons(columns, [roles[p] for p in places], owner=model, name=name))
    return found, refused


def _flags(labels: list[Tensor], count: int) -> Tensor:
    flags = torch.zeros(count, dtype=torch.bool, device="cpu")
    if labels:
        flags[torch.cat([part.reshape(-1) for part in labels])] = True
    flags[0] = False
    return flags


def _labels(ledger: Ledger, place: Place) -> Tensor:
    start = ledger.starts[place]
    return torch.arange(start, start + ledger.tensors[place[0]].shape[place[1]], device="cpu")


def _families(ledger: Ledger, classes: Tensor) -> list[list[Place]]:
    """Places that share a class, directly or through others, in the order in which they were met."""
    places = sorted(ledger.starts, key=lambda p: ledger.starts[p])
    holds = [torch.unique(classes[_labels(ledger, place)]) + len(places) for place in places]
    pairs = [torch.stack([torch.full_like(held, i), held]) for i, held in enumerate(holds)]
    members: dict[int, list[Place]] = {}
    for place, root in zip(places, united(pairs, len(places) + ledger.count).tolist(), strict=False):
        members.setdefault(root, []).append(place)
    return list(members.values())


def _tied(vectors: dict[Place, Tensor]) -> dict[Place, Tensor]:
    """Where tensors hold several kinds of units, equally many of each, the i-th of each kind as one unit.

    The parts of a packed projection may be exchangeable on their own (query and key with one head, value with the
    mixed one). No slice names one part alone; exchanging them in step is a slice.
    """
    held: dict[int, list[Place]] = {}
    order: dict[int, int] = {}
    for place, vector in vectors.items():
        for c in dict.fromkeys(vector.tolist()):
            held.setdefault(c, []).append(place)
            order.setdefault(c, len(order))
    kinds: dict[tuple[Place, ...], list[int]] = {}
    for c in sorted(held, key=order.__getitem__):
        kinds.setdefault(tuple(held[c]), []).append(c)
    if len({len(units) for units in kinds.values()}) != 1:
        return vectors
    first, *others = kinds.values()
    same = {c: first[i] for units in others for i, c in enumerate(units)}
    return {p: torch.tensor([same.get(c, c) for c in v.tolist()], device="cpu") for p, v in vectors.items()}


def _columns(tensors: dict[str, Tensor], vectors: dict[Place, Tensor], n: int) -> list[Slice] | None:
    """One slice for each place if all are laid out as ``(outer, n, inner)`` in one order of units, else ``None``."""
    order: Tensor | None = None
    columns = []
    for (name, dim), vector in vectors.items():
        if len(vector) % n:
            return None
        runs = torch.unique_consecutive(vector)
        if len(runs) % n:
            return None
        outer, inner = len(runs) // n, len(vector) // len(runs)
        order = runs[:n] if order is None else order
        if len(order) != n or not torch.equal(vector, order.repeat_interleave(inner).repeat(outer)):
            return None
        columns.append(Slice(tensors[name], dim, outer, inner))
    return columns
