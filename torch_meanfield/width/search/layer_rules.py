"""What layers and attention do to labels: they emit, consume, and make blocks of them."""

from __future__ import annotations

from torch import Tensor

from torch_meanfield.observe import Call
from torch_meanfield.observe.functions import CONVOLUTIONS, MULTIHEAD
from torch_meanfield.width.search.join import contract, dims_of, elementwise, product
from torch_meanfield.width.search.labels import Ledger, Tracks, compact, varying
from torch_meanfield.width.search.operation_rules import pad_left, values_vary
from torch_meanfield.width.search.rules import rule_for

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@rule_for("linear", makes_units=True)
def linear(ledger: Ledger, call: Call) -> Tracks:
    """``(..., in) -> (..., out)``; what does not vary along ``in`` passes, as with a layer over tokens."""
    x, w, bias = call.arg(0, "input"), call.arg(1, "weight"), call.arg(2, "bias")
    lead = _LETTERS[: x.ndim - 1]
    tracks = product(ledger, f"{lead}y,zy->{lead}z", x, w, weight=True)
    return _with_bias(ledger, tracks, bias, call.result.ndim - 1, call.result.ndim)


def _with_bias(ledger: Ledger, tracks: Tracks, bias: Tensor | None, dim: int, ndim: int) -> Tracks:
    if bias is None:
        return tracks
    theirs = tuple(t.reshape((1,) * dim + (-1,) + (1,) * (ndim - dim - 1)) for t in ledger.state(bias).tracks)
    ledger.emitted.extend(t.reshape(-1) for t in theirs)
    # What varies along other dimensions (a token mixer's channels) is not disturbed by a bias along this one.
    tracks, _ = elementwise(ledger, tracks, {dim}, theirs, {dim} if bias.numel() > 1 else set())
    return tracks


def _mixes_channels(call: Call) -> bool:
    """Not so a depthwise convolution: its output is still the same units."""
    w = call.arg(1, "weight")
    return int(call.arg(6, "groups", 1)) == 1 or not isinstance(w, Tensor) or w.shape[1] > 1


@rule_for(*CONVOLUTIONS, makes_units=_mixes_channels)
def conv(ledger: Ledger, call: Call) -> Tracks:
    """Convolutions, transposed ones included. The unit of a grouped one is the group, of a depthwise one the channel.

    With ``ledger.free_groups``, the unit of a grouped one is the place within each group.
    """
    x, w, bias = call.arg(0, "input"), call.arg(1, "weight"), call.arg(2, "bias")
    transposed = "transpose" in call.name
    groups = int(call.arg(6, "groups", 1))
    tracks = tuple(ledger.collapse(t, range(2, x.ndim)) for t in ledger.state(x).tracks)
    tracks = tuple(t.reshape(t.shape[:2]) for t in tracks if varying(t))
    # Kernel positions are not units: labels there (of a computed kernel) have nothing to be exchanged with.
    weights = [t for t in ledger.state(w).tracks if t.shape[0] > 1 or t.shape[1] > 1]
    weights = [ledger.collapse(t, range(2, w.ndim)).reshape(t.shape[:2]) for t in weights]
    batch, channels = x.shape[:2]
    if groups == 1:
        dims = {"y": channels, "z": w.shape[1]} if transposed else {"z": w.shape[0], "y": channels}
        out = contract(ledger, tracks, {"b": batch, "y": channels}, weights, dims, "bz", weight=True)
    elif transposed:
        for t in (*tracks, *weights):
            ledger.freeze(t, "meets a grouped transposed convolution")
        out = ()
    else:
        out = _grouped(ledger, tracks, x, weights, w, groups)
    out = tuple(t.reshape(*t.shape, *(1,) * (x.ndim - 2)) for t in out)
    return _with_bias(ledger, out, bias, 1, x.ndim)


def _grouped(ledger: Ledger, tracks: Tracks, x: Tensor, weights: list[Tensor], w: Tensor, groups: int) -> Tracks:
    # x: (batch, group, in), w: (group, out, in), result: (batch, group, out); a group is a batch entry of its own.
    inside, outside = w.shape[1], w.shape[0] // groups
    xs = [compact(t.expand(-1, x.shape[1]).reshape(-1, groups, inside)) for t in tracks]
    ws = [compact(t.expand(w.shape[0], -1).reshape(groups, outside, -1)) for t in weights]
    x_dims = {"b": int(x.shape[0]), "g": groups, "i": inside}
    w_dims = {"g": groups, "o": outside, "i": inside}
    if ledger.free_groups:
        xs, ws = [ledger.collapse(t, [1]) for t in xs], [ledger.collapse(t, [0]) for t in ws]
        out = contract(ledger, xs, x_dims, ws, w_dims, "bgo", weight=True)
    else:
        if inside > 1:  # the weights inside a group stay with it: their places are the same in each
            xs, ws = [ledger.collapse(t, [2]) for t in xs], [t for t in ws if 0 in varying(t)]
        ws = [ledger.collapse(t, [1]) for t in ws]
        xs = [t.reshape(t.shape[0], groups, 1) for t in xs if varying(t) <= {0, 1}]
        ws = [t.reshape(1, groups, 1) for t in ws if varying(t) <= {0}]
        out, _ = elementwise(ledger, xs, {0, 1}, ws, {1})
        if not xs:
            for t in ws:
                ledger.freeze(t, "reads channels that no layer owns")
            out = ()
    return tuple(compact(t.expand(-1, groups, outside).flatten(1, 2)) for t in out if varying(t))


@rule_for("matmul", "bmm", "mm", "baddbmm", "addmm", "mv")
def matmul(ledger: Ledger, call: Call) -> Tracks:
    """``a @ b`` of activations or parameters, any number of batch dimensions."""
    a, b = call.args[0], call.args[1]
    if call.name in ("baddbmm", "addmm"):
        a, b = call.args[1], call.args[2]
    lead = max(a.ndim, b.ndim) - 2
    batch = _LETTERS[: max(lead, 0)]
    a_letters = batch[len(batch) - (a.ndim - 2) :] + "xy" if a.ndim > 1 else "y"
    b_letters = batch[len(batch) - (b.ndim - 2) :] + "yz" if b.ndim > 1 else "y"
    out = batch + ("x" if a.ndim > 1 else "") + ("z" if b.ndim > 1 else "")
    weight = ledger.is_parameter(b) and not ledger.is_parameter(a)
    tracks = product(ledger, f"{a_letters},{b_letters}->{out}", a, b, weight=weight)
    if call.name in ("baddbmm", "addmm"):
        tracks = _added(ledger, tracks, len(out), call.args[0])
    return tracks


def _added(ledger: Ledger, tracks: Tracks, ndim: int, other: Tensor) -> Tracks:
    state = ledger.state(other)
    theirs, vary = pad_left(state.tracks, ndim), values_vary(ledger, other, state, ndim)
    return elementwise(ledger, tracks, set(range(ndim)), theirs, vary)[0]


@rule_for("einsum")
def einsum(ledger: Ledger, call: Call) -> Tracks | None:
    """Of two operands; others are unknown."""
    equation, operands = call.args[0], list(call.args[1:])
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation or "..." in equation or len(operands) != 2:
        return None
    equation = equation.replace(" ", "")
    if any(len(set(letters)) < len(letters) for letters in equation.split("->")[0].split(",")):
        return None
    return product(ledger, equation, *operands, weight=ledger.is_parameter(operands[1]))


@rule_for("scaled_dot_product_attention")
def attention(ledger: Ledger, call: Call) -> Tracks:
    """``scaled_dot_product_attention``: the unit is what one matrix of scores belongs to, the head.

    Of grouped queries, a head of keys and values with all heads of queries that share it.
    """
    q, k, v = call.arg(0, "query"), call.arg(1, "key"), call.arg(2, "value")
    mask = call.arg(3, "attn_mask")
    lead = _LETTERS[: q.ndim - 2]
    of_q = dims_of(q, lead + "xe")
    of_k, of_v = ({c: of_q[c] for c in lead} | {"y": t.shape[-2], c: t.shape[-1]} for t, c in ((k, "e"), (v, "z")))
    scores = contract(ledger, ledger.state(q).tracks, of_q, _each(ledger, k, q), of_k, lead + "xy")
    if mask is not None:
        scores = _added(ledger, scores, q.ndim, mask)
    of_scores = {c: (of_q | of_k)[c] for c in lead + "xy"}
    return contract(ledger, scores, of_scores, _each(ledger, v, q), of_v, lead + "xz")


def _each(ledger: Ledger, shared: Tensor, queries: Tensor) -> Tracks:
    """The tracks of keys or values as if each head of the queries had its own."""
    times = queries.shape[-3] // shared.shape[-3] if queries.ndim > 3 else 1
    tracks = ledger.state(shared).tracks
    return tuple(t.repeat_interleave(times, -3) if t.ndim > 2 and t.shape[-3] > 1 else t for t in tracks)


@rule_for(MULTIHEAD, makes_units=True)
def multi_head_attention(ledger: Ledger, call: Call) -> list[Tracks] | None:
    """``nn.MultiheadAttention`` with a packed projection; query, key and value are ``(length, batch, channel)``."""
    names = ("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k",
             "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias")  # fmt: skip
    given = {name: call.arg(i, name) for i, name in enumerate(names)}
    w, heads = given["in_proj_weight"], given["num_heads"]
    if w is None or given["bias_k"] is not None or call.kwargs.get("use_separate_proj_weight"):
        return None
    width = w.shape[0] // 3
    rows = [t for t in ledger.state(w).tracks if t.shape[0] > 1]
    columns = [t for t in ledger.state(w).tracks if t.shape[1] > 1]
    if given["in_proj_bias"] is not None:
        ledger.unite(rows[0].reshape(-1), ledger.state(given["in_proj_bias"]).tracks[0])
        ledger.emitted.append(ledger.state(given["in_proj_bias"]).tracks[0])
    ledger.emitted.append(rows[0].reshape(-1))
    ledger.consumed.append(columns[0].reshape(-1))
    for name in ("query", "key", "value"):
        for t in ledger.state(given[name]).tracks:
            ledger.unite(ledger.collapse(t, (0, 1)), columns[0].reshape(1, 1, -1))
    blocks = ledger.collapse(rows[0].reshape(3, heads, width // heads), (0, 2)).expand(1, heads, width // heads)
    heads_out, w = [compact(blocks.reshape(1, 1, width))], given["out_proj_weight"]
    sizes = {"a": 2, "b": 2, "y": width}
    tracks = contract(ledger, heads_out, sizes, ledger.state(w).tracks, dims_of(w, "zy"), "abz", weight=True)
    return [_with_bias(ledger, tracks, given["out_proj_bias"], 2, 3), ()]
