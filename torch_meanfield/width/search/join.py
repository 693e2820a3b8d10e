"""How labels meet: element by element, and in contractions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_meanfield.width.search.labels import Ledger, Tracks, compact, pairs_of, united, varying


def elementwise(
    ledger: Ledger, a: Sequence[Tensor], a_varies: set[int], b: Sequence[Tensor], b_varies: set[int]
) -> tuple[Tracks, bool]:
    """The tracks of ``f(a[i], b[i])``, of operands aligned to one number of dimensions.

    Labels of ``a`` and ``b`` at the same place are united where that divides them into more than one unit. A track
    that finds no partner is united along the dimensions in which the other operand varies, since that one's entries
    there are all different: what is left over may still be exchanged (the heads, when a rotation of the channels in a
    head is multiplied in).

    Args:
        a, b: compact tracks of the operands.
        a_varies, b_varies: dimensions along which the operands' values differ.

    Returns:
        the tracks of the result, and whether two different labels met.
    """
    out: list[Tensor] = []
    taken: set[int] = set()
    met = False
    for t in a:
        partner = None
        for i, u in enumerate(b):
            if i in taken:
                continue
            kind = match(ledger, t, u)
            if kind:
                partner = i
                met = met or kind == "met"
                taken.add(i)
                t = ledger.collapse(t, varying(t) - varying(u))  # of the two, it varies only where both do
                break
        if partner is None:
            t = ledger.collapse(t, b_varies)
        if varying(t):
            out.append(t)
    for i, u in enumerate(b):
        if i not in taken:
            u = ledger.collapse(u, a_varies)
            if varying(u):
                out.append(u)
    return tuple(out), met


def match(ledger: Ledger, a: Tensor, b: Tensor) -> str:
    """Unite two aligned tracks if they can be the same units: ``"same"``, ``"met"`` (united now), or ``""``."""
    if a.shape == b.shape and torch.equal(a, b):
        return "same"
    va, vb = varying(a), varying(b)
    if not va & vb:
        return ""
    pairs = pairs_of(a, b)
    na, nb, n = torch.unique(pairs[0]).numel(), torch.unique(pairs[1]).numel(), pairs.shape[1]
    if min(na, nb) < 2:
        return ""
    if n == na == nb or (not _shared(va, vb) and (n == max(na, nb) or _components(pairs) > 1)):
        ledger.pairs.append(pairs)
        return "met"
    return ""


def _shared(va: set[int], vb: set[int]) -> bool:
    # (head, channel) against (channel): the second is used alike by every head. It belongs to no unit, and the units
    # are what comes first, the heads. (head, channel) against (head) is no such case: one number for each unit.
    wide, thin = (va, vb) if va >= vb else (vb, va)
    return wide > thin and min(wide - thin) < min(thin)


def _components(pairs: Tensor) -> int:
    a, b = (torch.unique(side, return_inverse=True)[1] for side in pairs)
    return len(torch.unique(united([torch.stack([a, b + len(a)])], 2 * len(a))[a]))


def align(track: Tensor, letters: str, order: str) -> Tensor:
    """Permute a track with dimensions called ``letters`` to ``order``, size 1 where it has no such dimension."""
    present = [c for c in order if c in letters]
    track = track.permute([letters.index(c) for c in present])
    for i, c in enumerate(order):
        if c not in letters:
            track = track.unsqueeze(i)
    return track


def contract(
    ledger: Ledger,
    a: Sequence[Tensor],
    a_dims: dict[str, int],
    b: Sequence[Tensor],
    b_dims: dict[str, int],
    out: str,
    *,
    weight: bool = False,
) -> Tracks:
    """The tracks of ``einsum("...,...->out", a, b)``.

    A track that varies along summed dimensions alone is consumed: its units are summed over, and must be permuted
    together with the other operand's. One that varies along others too leaves a block: everything that is summed
    into one entry is united (the channels of a head).

    Args:
        a, b: compact tracks of the operands.
        a_dims, b_dims: a letter and a size for each of their dimensions, in order.
        out: the letters of the result.
        weight: ``b`` is the weight of a layer: what is consumed in it is outgoing, what it puts out is incoming.
    """
    order = out + "".join(c for c in dict.fromkeys([*a_dims, *b_dims]) if c not in out)
    summed = set(range(len(out), len(order)))
    passed: list[list[Tensor]] = [[], []]
    consumed: list[list[Tensor]] = [[], []]
    blocks: list[list[Tensor]] = [[], []]
    for side, (tracks, dims) in enumerate(((a, a_dims), (b, b_dims))):
        for t in tracks:
            t = align(t, "".join(dims), order)
            v = varying(t)
            if not v & summed:
                passed[side].append(t)
                if weight and side == 1:
                    ledger.emitted.append(t.reshape(-1))
                continue
            left = ledger.collapse(t, summed) if v - summed else t
            if varying(left) - summed:
                passed[side].append(left)
            (consumed if varying(left) & summed else blocks)[side].append(t)
    for t in consumed[0] + blocks[0]:
        for u in consumed[1] + blocks[1]:
            if varying(t) & varying(u) & summed:
                ledger.unite(t, u)
                if weight:
                    ledger.consumed.append(u.reshape(-1))
    for side in (0, 1):
        for t in consumed[side]:
            if not any(varying(t) & varying(u) & summed for u in consumed[1 - side] + blocks[1 - side]):
                ledger.freeze(t, "is weighed by numbers, or read from channels, that no unit owns")
    varies = [{i for i, c in enumerate(out) if dims.get(c, 1) > 1} for dims in (a_dims, b_dims)]
    result, _ = elementwise(ledger, passed[0], varies[0], passed[1], varies[1])
    return tuple(compact(t.reshape(t.shape[: len(out)])) for t in result)


def product(ledger: Ledger, equation: str, a: Tensor, b: Tensor, *, weight: bool = False) -> Tracks:
    """The tracks of ``torch.einsum(equation, a, b)``; see :func:`contract`."""
    operands, out = equation.split("->")
    first, second = operands.split(",")
    return contract(
        ledger,
        ledger.state(a).tracks,
        dims_of(a, first),
        ledger.state(b).tracks,
        dims_of(b, second),
        out,
        weight=weight,
    )


def dims_of(tensor: Tensor, letters: str) -> dict[str, int]:
    """A letter and a size for each dimension."""
    return dict(zip(letters, tensor.shape, strict=True))
