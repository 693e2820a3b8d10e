"""What each operation does to labels: element-wise, shape, reduction and normalisation functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_meanfield.observe import Call, map_tensors, tensors_in
from torch_meanfield.observe.functions import (
    ADDITIONS,
    CHANNEL_NORMS,
    LAST_NORMS,
    NARY,
    REDUCE,
    SHAPE,
    SOFT,
    SPATIAL,
    UNARY,
)
from torch_meanfield.width.search.join import elementwise
from torch_meanfield.width.search.labels import Ledger, State, Tracks, compact, varying
from torch_meanfield.width.search.rules import rule_for


def pad_left(tracks: Sequence[Tensor], ndim: int) -> Tracks:
    """Align tracks to ``ndim`` dimensions as broadcasting does."""
    return tuple(t.reshape((1,) * (ndim - t.ndim) + tuple(t.shape)) for t in tracks)


def values_vary(ledger: Ledger, tensor: Tensor, state: State, ndim: int) -> set[int]:
    """The dimensions (of ``ndim``, aligned to the right) along which the numbers in ``tensor`` differ.

    Of what the model computed from its input or a parameter, every dimension; masks and grids are looked at.
    """
    dims = {d for d, size in enumerate(tensor.shape) if size > 1}
    if not state.tracks and not state.history and tensor.numel() <= 1 << 20:
        dims = varying(compact(tensor.detach()))
    return {d + ndim - tensor.ndim for d in dims}


@rule_for(*UNARY)
def unary(ledger: Ledger, call: Call) -> Tracks:
    """The labels of the first operand."""
    return ledger.state(call.args[0]).tracks if call.args else ()


@rule_for("copy_")
def copy(ledger: Ledger, call: Call) -> Tracks:
    """``x.copy_(y)``: the labels of y."""
    return ledger.state(call.args[1]).tracks


@rule_for(*NARY)
def nary(ledger: Ledger, call: Call) -> Tracks:
    """Labels of all tensor operands meet, place by place."""
    tensors = [t for t in (*call.args, *call.kwargs.values()) if isinstance(t, Tensor)]
    ndim = max(t.ndim for t in tensors)
    first = ledger.state(tensors[0])
    tracks, varies = pad_left(first.tracks, ndim), values_vary(ledger, tensors[0], first, ndim)
    for tensor in tensors[1:]:
        state = ledger.state(tensor)
        theirs, their_varies = pad_left(state.tracks, ndim), values_vary(ledger, tensor, state, ndim)
        known = len(ledger.pairs)
        result, met = elementwise(ledger, tracks, varies, theirs, their_varies)
        if met and call.name in ADDITIONS and is_residual(first, state):
            ledger.stream.append((known, len(ledger.pairs)))
        tracks, varies = result, varies | their_varies
    return tracks


def is_residual(a: State, b: State) -> bool:
    """Whether an addition joins a branch to what it was computed from, or two branches of which one has an interior.

    Both come from one ancestor, and beyond the layers that made the two summands there is a layer in one that the
    other did not pass. Not so in a hidden width: GRN adds a unit to itself, RepVGG two layers side by side.
    """
    if not (a.sources and b.sources and a.history & b.history):
        return False
    ends = a.sources | b.sources
    through = (a.sources != b.sources) and (a.sources & b.history == a.sources or b.sources & a.history == b.sources)
    return through or bool((a.history ^ b.history) & ~ends)


@rule_for(*SHAPE)
def shape(ledger: Ledger, call: Call) -> list[Tracks]:
    """Do to each track what was done to the tensor."""
    tensor = call.args[0]
    count = len(tensors_in(call.result))
    out: list[list[Tensor]] = [[] for _ in range(count)]
    for t in ledger.state(tensor).tracks:
        full = t.expand(tensor.shape)
        for i, moved in enumerate(tensors_in(_redo(call, full))):
            moved = compact(moved)
            if varying(moved):
                out[i].append(moved)
    return [tuple(o) for o in out]


def _redo(call: Call, full: Tensor) -> object:
    args = map_tensors(Tensor.cpu, call.args[1:])  # where labels are
    if call.name in ("view", "view_as"):  # an expanded tensor has no such view
        return full.reshape(args[0].shape) if call.name == "view_as" else full.reshape(*args, **call.kwargs)
    if call.name == "as_strided":
        full = full.contiguous()
    kwargs = {k: 0 if k == "value" else map_tensors(Tensor.cpu, v) for k, v in call.kwargs.items()}
    if call.name == "pad" and len(args) > 2:
        args = (*args[:2], 0)
    try:
        return call.func(full, *args, **kwargs)
    except (RuntimeError, NotImplementedError):  # some are not written for integers; doubles hold labels exactly
        moved = call.func(full.double(), *args, **kwargs)
        return [m.long() for m in tensors_in(moved)]


@rule_for("cat", "concat", "concatenate")
def cat(ledger: Ledger, call: Call) -> Tracks:
    """Tracks that vary along the joined dimension are joined; the others meet."""
    tensors = [t for t in call.arg(0, "tensors") if t.numel()]
    dim = int(call.arg(1, "dim", 0)) % call.result.ndim
    joined: list[Tensor] = []
    across: Tracks = ()
    for tensor in tensors:
        mine = ledger.state(tensor).tracks
        along = [t for t in mine if t.shape[dim] > 1]
        rest = tuple(t for t in mine if t.shape[dim] == 1)
        if tensor.shape[dim] == 1 and not along and call.result.shape[dim] == len(tensors):
            along, rest = list(rest), ()  # one entry each: as stack
        across, _ = elementwise(ledger, across, set(), rest, set())
        for extra in along[1:]:
            ledger.freeze(extra, "is one of several kinds of units that a concatenation joins")
        joined.append((along[0] if along else torch.zeros((), dtype=torch.int64, device="cpu")).expand(tensor.shape))
    whole = compact(torch.cat(joined, dim)) if any(t.any() for t in joined) else None
    return (*across, whole) if whole is not None and varying(whole) else across


@rule_for("stack")
def stack(ledger: Ledger, call: Call) -> Tracks:
    """As :func:`cat`, along a new dimension."""
    tensors = list(call.arg(0, "tensors"))
    dim = int(call.arg(1, "dim", 0)) % call.result.ndim
    count = max(len(ledger.state(t).tracks) for t in tensors)
    out = []
    for k in range(count):
        none = (torch.zeros((), dtype=torch.int64, device="cpu"),)
        full = [(*ledger.state(t).tracks[k : k + 1], *none)[0].expand(t.shape) for t in tensors]
        out.append(compact(torch.stack(full, dim)))
    return tuple(t for t in out if varying(t))


@rule_for(*REDUCE)
def reduction(ledger: Ledger, call: Call) -> Tracks | list[Tracks]:
    """A sum over all of a track's units is symmetric in them and has no label; one over part of them leaves blocks."""
    tensor = call.args[0]
    dim = call.arg(REDUCE[call.name], "dim", call.kwargs.get("axis"))
    if call.name in ("max", "min") and isinstance(call.arg(1, "other"), Tensor):
        return nary(ledger, call)
    dims = set(range(tensor.ndim)) if dim is None or dim == () else {int(d) % tensor.ndim for d in _listed(dim)}
    results = tensors_in(call.result)
    keep = results[0].ndim == tensor.ndim
    out = []
    for t in ledger.state(tensor).tracks:
        v = varying(t)
        if v <= dims:
            continue
        t = ledger.collapse(t, dims)
        t = t if keep else t.reshape([s for d, s in enumerate(t.shape) if d not in dims])
        if varying(t):
            out.append(t)
    return [tuple(out)] * len(results)


def _listed(dim: int | Sequence[int]) -> Sequence[int]:
    return [dim] if isinstance(dim, int) else dim


@rule_for(*SPATIAL)
def spatial(ledger: Ledger, call: Call) -> list[Tracks]:
    """Pooling and resizing: dimensions 0 and 1 keep their labels."""
    tensor = call.args[0]
    tracks = [ledger.collapse(t, range(2, tensor.ndim)) for t in ledger.state(tensor).tracks]
    return [tuple(t for t in tracks if varying(t))] * len(tensors_in(call.result))


def within_blocks(ledger: Ledger, tracks: Tracks, dims: set[int]) -> Tracks:
    """Normalising over part of the units makes blocks of them; over all, it is symmetric."""
    out = tuple(ledger.collapse(t, dims) if varying(t) - dims else t for t in tracks)
    return tuple(t for t in out if varying(t))


@rule_for(*SOFT)
def soft(ledger: Ledger, call: Call) -> Tracks:
    """Softmax and normalisation to unit length over one dimension."""
    tensor = call.args[0]
    dim = call.arg(SOFT[call.name], "dim", 1 if call.name == "normalize" else -1)
    dims = {int(d) % tensor.ndim for d in _listed(-1 if dim is None else dim)}
    return within_blocks(ledger, ledger.state(tensor).tracks, dims)


@rule_for(*CHANNEL_NORMS, *LAST_NORMS)
def norm(ledger: Ledger, call: Call) -> Tracks:
    """Batch, instance, layer and RMS norms: gains, biases and statistics meet the channels they are applied to."""
    tensor = call.args[0]
    tracks = ledger.state(tensor).tracks
    if call.name in LAST_NORMS:
        last = len(_listed(call.arg(1, "normalized_shape")))
        tracks = within_blocks(ledger, tracks, set(range(tensor.ndim - last, tensor.ndim)))
    return _affine(ledger, call, tracks)


def _affine(ledger: Ledger, call: Call, tracks: Tracks) -> Tracks:
    tensor = call.args[0]
    shape_ = {d for d, size in enumerate(tensor.shape) if size > 1}
    for vector in (t for t in (*call.args[1:], *call.kwargs.values()) if isinstance(t, Tensor)):
        theirs = ledger.state(vector).tracks
        if call.name in LAST_NORMS:
            theirs = pad_left(theirs, tensor.ndim)
            dims = set(range(tensor.ndim - vector.ndim, tensor.ndim))
        else:
            theirs = tuple(t.reshape((1, -1) + (1,) * (tensor.ndim - 2)) for t in theirs)
            dims = {1}
        tracks, _ = elementwise(ledger, tracks, shape_, theirs, dims & shape_)
    return tracks


@rule_for("prelu")
def prelu(ledger: Ledger, call: Call) -> Tracks:
    """A slope for each channel."""
    return _affine(ledger, call, ledger.state(call.args[0]).tracks)


@rule_for("group_norm")
def group_norm(ledger: Ledger, call: Call) -> Tracks:
    """The unit is the norm group; with a single group, the channel."""
    tensor, groups = call.args[0], int(call.arg(1, "num_groups"))
    tracks = ledger.state(tensor).tracks
    if groups > 1:
        grouped = []
        for t in tracks:
            full = t.expand(-1, tensor.shape[1], *(-1,) * (tensor.ndim - 2))
            by_group = full.reshape(full.shape[0], groups, -1, *full.shape[2:])
            blocks = ledger.collapse(by_group, range(2, tensor.ndim + 1))
            grouped.append(compact(blocks.expand(-1, groups, by_group.shape[2], *blocks.shape[3:]).flatten(1, 2)))
        tracks = tuple(t for t in grouped if varying(t))
    return _affine(ledger, call, tracks)


@rule_for("glu")
def glu(ledger: Ledger, call: Call) -> Tracks:
    """The two halves of a packed gate meet."""
    x, dim = call.args[0], int(call.arg(1, "dim", -1))
    tracks: Tracks = ()
    for t in ledger.state(x).tracks:
        a, b = (compact(half) for half in t.expand(x.shape).chunk(2, dim))
        ledger.unite(a, b)
        tracks += (a,) if varying(a) else ()
    return tracks


def setitem(ledger: Ledger, call: Call) -> None:
    """``x[index] = value``: the labels of the value meet those of the place, or fill it."""
    x, index, value = call.args[0], map_tensors(Tensor.cpu, call.args[1]), call.args[2]
    state, theirs = ledger.state(x), ledger.state(value)
    new = list(state.tracks)
    for t in theirs.tracks:
        full = t.expand(value.shape)
        if new:
            place = new[0].expand(x.shape).clone()
            here = place[index]
            ledger.unite(here, full.expand(here.shape))
            place[index] = torch.where(here == 0, full.expand(here.shape), here)
            new[0] = compact(place)
        else:
            place = torch.zeros(x.shape, dtype=torch.int64, device="cpu")
            place[index] = full
            new.append(compact(place))
    ledger.put(x, State(tuple(new), state.sources | theirs.sources, state.history | theirs.history))
