"""Which units label propagation finds in small networks whose populations are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_meanfield.observe import Call
from torch_meanfield.width.search import Ledger, Tracks, find_populations, product, rule_for
from torch_meanfield.width.search.rules import RULES

Columns = set[tuple[str, int, int, int, str]]


def columns_of(model: nn.Module, example: Tensor) -> dict[str, tuple[int, Columns]]:
    """Of each proven population its size and its columns (tensor, dim, outer, inner, role)."""
    names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    return {
        p.name: (
            p.size,
            {
                (names[id(c.tensor)], c.dim, c.outer, c.inner, r)
                for c, r in zip(p.slices(p.columns), p.roles, strict=True)
            },
        )
        for p in find_populations(model, example)
    }


class Fn(nn.Module):
    """Modules and the function that uses them."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.f = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def bn(name: str) -> Columns:
    return {(f"{name}.{t}", 0, 1, 1, "own") for t in ("weight", "bias", "running_mean", "running_var")}


def test_mlp() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))
    assert columns_of(net, torch.randn(1, 3)) == {
        "0.weight": (8, {("0.weight", 0, 1, 1, "in"), ("0.bias", 0, 1, 1, "in"), ("2.weight", 1, 1, 1, "out")})
    }


def test_unpacked_gate_with_norm() -> None:
    net = Fn(
        lambda m, x: m.c(m.n(F.silu(m.a(x)) * m.b(x))),
        a=nn.Linear(3, 8), b=nn.Linear(3, 8, bias=False), n=nn.LayerNorm(8), c=nn.Linear(8, 2),
    )  # fmt: skip
    assert columns_of(net, torch.randn(1, 3)) == {
        "a.weight": (
            8,
            {
                ("a.weight", 0, 1, 1, "in"),
                ("a.bias", 0, 1, 1, "in"),
                ("b.weight", 0, 1, 1, "in"),
                ("n.weight", 0, 1, 1, "own"),
                ("n.bias", 0, 1, 1, "own"),
                ("c.weight", 1, 1, 1, "out"),
            },
        )
    }


def test_packed_gate() -> None:
    net = Fn(lambda m, x: m.b(F.glu(m.a(x))), a=nn.Linear(3, 16), b=nn.Linear(8, 2))
    halves = Fn(lambda m, x: m.b(torch.mul(*m.a(x).chunk(2, -1))), a=nn.Linear(3, 16), b=nn.Linear(8, 2))
    expected = {"a.weight": (8, {("a.weight", 0, 2, 1, "in"), ("a.bias", 0, 2, 1, "in"), ("b.weight", 1, 1, 1, "out")})}
    assert columns_of(net, torch.randn(1, 3)) == expected
    assert columns_of(halves, torch.randn(1, 3)) == expected


def test_residual_block_and_not_the_stream() -> None:
    net = Fn(
        lambda m, x: m.head(block(m, m.stem(x)).mean((2, 3))),
        stem=nn.Conv2d(3, 6, 3), conv1=nn.Conv2d(6, 8, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(8),
        conv2=nn.Conv2d(8, 6, 3, padding=1), bn2=nn.BatchNorm2d(6), head=nn.Linear(6, 2),
    )  # fmt: skip

    def block(m: nn.Module, x: Tensor) -> Tensor:
        return F.relu(x + m.bn2(m.conv2(F.relu(m.bn1(m.conv1(x))))))

    expected = {("conv1.weight", 0, 1, 1, "in"), ("conv2.weight", 1, 1, 1, "out"), *bn("bn1")}
    assert columns_of(net, torch.randn(1, 3, 8, 8)) == {"conv1.weight": (8, expected)}
    report = find_populations(net, torch.randn(1, 3, 8, 8))
    assert [(r.name, "residual stream" in r.reason) for r in report.refused] == [("stem.weight", True)]
    assert "refused stem.weight" in str(report)


def test_projected_shortcut_is_a_stream_too() -> None:
    net = Fn(
        lambda m, x: m.head((m.short(x) + m.conv2(F.relu(m.conv1(x)))).mean((2, 3))),
        short=nn.Conv2d(3, 6, 1), conv1=nn.Conv2d(3, 8, 1), conv2=nn.Conv2d(8, 6, 1), head=nn.Linear(6, 2),
    )  # fmt: skip
    assert set(columns_of(net, torch.randn(1, 3, 4, 4))) == {"conv1.weight"}


def test_parallel_convolutions_make_one_hidden_width() -> None:
    net = Fn(
        lambda m, x: m.out(F.relu(m.bn(m.a(x) + m.b(x)))),
        a=nn.Conv2d(3, 8, 3, padding=1), b=nn.Conv2d(3, 8, 1), bn=nn.BatchNorm2d(8), out=nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    ((size, columns),) = columns_of(net, torch.randn(1, 3, 4, 4)).values()
    assert size == 8 and {c for c in columns if c[4] == "in"} == {
        (f"{m}.{t}", 0, 1, 1, "in") for m in "ab" for t in ("weight", "bias")
    }


def test_depthwise_and_squeeze_excite_on_the_hidden_width() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = F.silu(m.dw(F.silu(m.bn(m.expand(x)))))
        return m.project(h * torch.sigmoid(m.up(F.relu(m.down(h.mean((2, 3), keepdim=True))))))

    net = Fn(
        forward, expand=nn.Conv2d(3, 8, 1, bias=False), bn=nn.BatchNorm2d(8),
        dw=nn.Conv2d(8, 8, 3, padding=1, groups=8), down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1),
        project=nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    found = columns_of(net, torch.randn(1, 3, 6, 6))
    assert found["expand.weight"] == (
        8,
        {
            ("expand.weight", 0, 1, 1, "in"),
            *bn("bn"),
            ("dw.weight", 0, 1, 1, "own"),
            ("dw.bias", 0, 1, 1, "in"),
            ("down.weight", 1, 1, 1, "out"),
            ("up.weight", 0, 1, 1, "in"),
            ("up.bias", 0, 1, 1, "in"),
            ("project.weight", 1, 1, 1, "out"),
        },
    )
    assert found["down.weight"][0] == 4 and len(found) == 2


def test_whole_groups_of_a_grouped_convolution() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, groups=4, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 2, 1),
    )  # fmt: skip
    found = columns_of(net, torch.randn(1, 3, 6, 6))
    assert found["0.weight"] == (
        4,
        {
            ("0.weight", 0, 1, 2, "in"),
            *((f"1.{t}", 0, 1, 2, "own") for t in ("weight", "bias", "running_mean", "running_var")),
            ("3.weight", 0, 1, 4, "own"),
            *((f"4.{t}", 0, 1, 4, "own") for t in ("weight", "bias", "running_mean", "running_var")),
            ("6.weight", 1, 1, 4, "out"),
        },
    )


def test_groups_of_a_group_norm() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    ((size, columns),) = columns_of(net, torch.randn(1, 3, 6, 6)).values()
    assert size == 4 and ("1.weight", 0, 1, 2, "own") in columns and ("3.weight", 1, 1, 2, "out") in columns


class Attention(nn.Module):
    def __init__(self, fused: bool = True, norm: bool = False, parts: bool = False) -> None:
        super().__init__()
        self.heads, self.fused = 3, fused
        self.qkv = nn.Linear(6, 36, bias=not parts)
        self.q_bias = nn.Parameter(torch.zeros(12)) if parts else None
        self.v_bias = nn.Parameter(torch.zeros(12)) if parts else None
        self.table = nn.Parameter(torch.zeros(9, 3)) if not fused else None
        self.norm = nn.LayerNorm(4) if norm else nn.Identity()
        self.proj = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        bias = self.qkv.bias
        if self.q_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias, requires_grad=False), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.norm(q), self.norm(k)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            a = q @ k.transpose(-2, -1)
            a = a + self.table[torch.arange(n)[:, None] + torch.arange(n)].permute(2, 0, 1)
            y = a.softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("parts", [True, False])
def test_attention_heads(fused: bool, norm: bool, parts: bool) -> None:
    net = Attention(fused, norm, parts)
    ((size, columns),) = columns_of(net, torch.randn(1, 5, 6)).values()
    expected = {("qkv.weight", 0, 3, 4, "in"), ("proj.weight", 1, 1, 4, "out")}
    expected |= {("q_bias", 0, 1, 4, "in"), ("v_bias", 0, 1, 4, "in")} if parts else {("qkv.bias", 0, 3, 4, "in")}
    expected |= set() if fused else {("table", 1, 1, 1, "own")}
    assert (size, columns) == (3, expected)  # a norm shared by the heads belongs to none


def test_torch_multihead_attention() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.mha = nn.Linear(3, 6), nn.MultiheadAttention(6, 3, batch_first=True)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            return self.head(self.mha(x, x, x, need_weights=False)[0])

    found = columns_of(Net(), torch.randn(2, 5, 3))
    sizes = {n: s for n, (s, _) in found.items()}
    assert sizes == {"inner.weight": 6, "mha.in_proj_weight": 3, "mha.out_proj.weight": 6}


def test_token_mixer_and_channel_mixer() -> None:
    net = Fn(
        lambda m, x: m.head(channels(m, tokens(m, m.embed(x))).mean(1)),
        embed=nn.Linear(3, 6), t1=nn.Linear(5, 7), t2=nn.Linear(7, 5), c1=nn.Linear(6, 8), c2=nn.Linear(8, 6),
        head=nn.Linear(6, 2),
    )  # fmt: skip

    def tokens(m: nn.Module, x: Tensor) -> Tensor:
        return x + m.t2(F.gelu(m.t1(x.transpose(1, 2)))).transpose(1, 2)

    def channels(m: nn.Module, x: Tensor) -> Tensor:
        return x + m.c2(F.gelu(m.c1(x)))

    found = columns_of(net, torch.randn(1, 5, 3))
    assert {n: s for n, (s, _) in found.items()} == {"t1.weight": 7, "c1.weight": 8}


def test_global_response_norm_inside_a_block() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem(x)
        h = F.gelu(m.a(x))
        g = h.norm(dim=1, keepdim=True)
        h = h + m.bias + m.gain * (h * (g / (g.mean(-1, keepdim=True) + 1e-6)))
        return m.head(x + m.b(h))

    net = Fn(
        forward, stem=nn.Linear(3, 6), a=nn.Linear(6, 8), b=nn.Linear(8, 6), head=nn.Linear(6, 2),
        gain=nn.Parameter(torch.ones(8)), bias=nn.Parameter(torch.ones(8)),
    )  # fmt: skip
    ((size, columns),) = columns_of(net, torch.randn(1, 4, 3)).values()
    assert size == 8 and ("gain", 0, 1, 1, "own") in columns and ("bias", 0, 1, 1, "own") in columns


def test_flattened_channels_and_concatenation_of_one_source() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    ((size, columns),) = columns_of(net, torch.randn(1, 3, 4, 4)).values()
    assert size == 4 and ("3.weight", 1, 1, 4, "out") in columns
    ghost = Fn(
        lambda m, x: m.out(torch.cat([(h := m.a(x)), m.dw(h)], 1)),
        a=nn.Conv2d(3, 4, 1), dw=nn.Conv2d(4, 4, 3, padding=1, groups=4), out=nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    ((size, columns),) = columns_of(ghost, torch.randn(1, 3, 4, 4)).values()
    assert size == 4 and ("out.weight", 1, 2, 1, "out") in columns


def test_standardised_weights_are_seen_through() -> None:
    def conv(m: nn.Module, x: Tensor, name: str) -> Tensor:
        w = getattr(m, name).weight
        w = F.batch_norm(w.reshape(1, len(w), -1), None, None, weight=getattr(m, name + "_gain"), training=True)
        return F.conv2d(x, w.reshape_as(getattr(m, name).weight), getattr(m, name).bias)

    net = Fn(
        lambda m, x: conv(m, F.relu(conv(m, x, "a")), "b"),
        a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1),
        a_gain=nn.Parameter(torch.ones(8)), b_gain=nn.Parameter(torch.ones(2)),
    )  # fmt: skip
    ((size, columns),) = columns_of(net, torch.randn(1, 3, 4, 4)).values()
    assert (size, columns) == (
        8,
        {
            ("a.weight", 0, 1, 1, "in"),
            ("a.bias", 0, 1, 1, "in"),
            ("a_gain", 0, 1, 1, "own"),
            ("b.weight", 1, 1, 1, "out"),
        },
    )


def test_what_cannot_be_followed_is_refused_by_name_and_reason() -> None:
    net = Fn(lambda m, x: m.b(torch.fft.fft(m.a(x)).real), a=nn.Linear(3, 8), b=nn.Linear(8, 2))
    report = find_populations(net, torch.randn(1, 3))
    assert not report.populations
    both = Fn(
        lambda m, x: m.out(torch.cat([m.a(x), m.b(x)], -1)), a=nn.Linear(3, 4), b=nn.Linear(3, 6), out=nn.Linear(10, 2)
    )
    (refused,) = find_populations(both, torch.randn(1, 3)).refused
    assert refused.name == "a.weight" and "only part of the units" in refused.reason


class Silu(torch.autograd.Function):
    """A kernel of its own: invisible to a ``TorchFunctionMode``."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        values = x.numpy()
        return torch.from_numpy(values / (1 + np.exp(-values)))


def test_templates_fill_in_where_labels_are_lost() -> None:
    net = Fn(
        lambda m, x: m.c(Silu.apply(m.n(m.b(Silu.apply(m.a(x)))))),
        a=nn.Linear(3, 8), b=nn.Linear(8, 6), n=nn.LayerNorm(6), c=nn.Linear(6, 2),
    )  # fmt: skip
    assert columns_of(net, torch.randn(1, 3)) == {
        "a.weight": (8, {("a.weight", 0, 1, 1, "in"), ("a.bias", 0, 1, 1, "in"), ("b.weight", 1, 1, 1, "out")}),
        "b.weight": (
            6,
            {
                ("b.weight", 0, 1, 1, "in"),
                ("b.bias", 0, 1, 1, "in"),
                ("n.weight", 0, 1, 1, "own"),
                ("n.bias", 0, 1, 1, "own"),
                ("c.weight", 1, 1, 1, "out"),
            },
        ),
    }


def test_templates_are_only_proposals() -> None:
    net = Fn(
        lambda m, x: m.b(Silu.apply(m.a(x)) * torch.arange(8.0)), a=nn.Linear(3, 8), b=nn.Linear(8, 2)
    )  # each unit has a place of its own
    report = find_populations(net, torch.randn(1, 3))
    assert not report.populations and "changes the output" in str(report)


def _overwritten(h: Tensor) -> Tensor:
    out = h.clone()
    out[:] = h.square()
    return out


def _halves(h: Tensor) -> Tensor:
    out = h.clone()
    out[:, :4] = h[:, 4:].tanh()
    return out


# The function between the eight units of ``a`` and what reads them; the columns that read them, and how many they are.
FORMS: dict[str, tuple[Callable[..., Tensor], tuple[str, int, int, int, str], int]] = {
    "einsum": (lambda m, h: torch.einsum("bj,kj->bk", h, m.w), ("w", 1, 1, 1, "out"), 8),
    "einsum of a list": (lambda m, h: torch.einsum("bj, kj -> bk", [h, m.w]), ("w", 1, 1, 1, "out"), 8),
    "addmm": (lambda m, h: torch.addmm(m.v, h, m.t), ("t", 0, 1, 1, "out"), 8),
    "addmm of what is theirs": (lambda m, h: m.b(torch.addmm(h, h, m.s, beta=0.0)), ("b.weight", 1, 1, 1, "out"), 8),
    "stack": (lambda m, h: m.b(torch.stack([h, h.square()], 1).sum(1)), ("b.weight", 1, 1, 1, "out"), 8),
    "stack behind": (lambda m, h: m.b(torch.stack([h, h.tanh()], -1).mean(-1)), ("b.weight", 1, 1, 1, "out"), 8),
    "maximum of two": (lambda m, h: m.b(torch.max(h, 0.1 * h)), ("b.weight", 1, 1, 1, "out"), 8),
    "written in place": (lambda m, h: m.b(_overwritten(h)), ("b.weight", 1, 1, 1, "out"), 8),
    "one half over the other": (lambda m, h: m.b(_halves(h)), ("b.weight", 1, 2, 1, "out"), 4),
}
UNKNOWN: dict[str, tuple[Callable[..., Tensor], str]] = {
    "constant padding": (lambda m, h: m.c(F.pad(h, (2, 0), value=1.0)), "holds channels that no layer makes"),
    "an einsum of three": (lambda m, h: torch.einsum("bj,kj,k->bk", h, m.w, m.v), "meets einsum"),
    "a diagonal": (lambda m, h: torch.einsum("jj,kj->k", h @ m.r, m.r), "meets einsum"),
    "a new tensor": (lambda m, h: m.b(h.new_zeros(1) + h), "meets new_zeros"),
}


def _between(form: Callable[..., Tensor]) -> Fn:
    torch.manual_seed(0)
    return Fn(
        lambda m, x: form(m, m.a(x)), a=nn.Linear(3, 8), b=nn.Linear(8, 2), c=nn.Linear(10, 2),
        w=nn.Parameter(torch.randn(2, 8)), t=nn.Parameter(torch.randn(8, 2)), v=nn.Parameter(torch.randn(2)),
        s=nn.Parameter(torch.randn(8, 8)), r=nn.Parameter(torch.randn(8, 4)),
    )  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_units_are_found_through_the_functions_that_models_are_written_with(name: str) -> None:
    form, reader, size = FORMS[name]
    (found,) = columns_of(_between(form), torch.randn(4, 3)).values()
    outer = 8 // size
    own = {("a.weight", 0, outer, 1, "in"), ("a.bias", 0, outer, 1, "in")}
    between = {("s", 0, 1, 1, "out"), ("s", 1, 1, 1, "in")} if "theirs" in name else set()
    assert found == (size, own | between | {reader})


@pytest.mark.parametrize("name", UNKNOWN)
def test_functions_that_cannot_be_followed_are_named(name: str) -> None:
    form, reason = UNKNOWN[name]
    report = find_populations(_between(form), torch.randn(4, 3))
    assert not report.populations and f"refused a.weight: {reason}" in str(report)


def test_a_grouped_transposed_convolution_keeps_its_channels() -> None:
    grouped = nn.ConvTranspose2d(8, 8, 2, groups=2)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), grouped, nn.ReLU(), nn.Conv2d(8, 2, 1))
    report = find_populations(net, torch.randn(1, 3, 4, 4))
    assert not report.populations and "0.weight: meets a grouped transposed convolution" in str(report)


@torch.library.custom_op("meanfield_tests::mixed", mutates_args=())
def mixed(x: Tensor, weight: Tensor) -> Tensor:
    """A layer that torch cannot look into."""
    return (x @ weight.T).square()


@pytest.mark.parametrize(
    "call", [mixed, torch.ops.meanfield_tests.mixed], ids=["by its default overload", "by its name"]
)
def test_a_registered_rule_finds_units_through_an_unknown_layer(call: Callable[..., Tensor]) -> None:
    net = Fn(
        lambda m, x: m.b(call(call(x, m.w), m.v)),
        w=nn.Parameter(torch.randn(8, 3)), v=nn.Parameter(torch.randn(6, 8)), b=nn.Linear(6, 2),
    )  # fmt: skip
    assert not columns_of(net, torch.randn(1, 3))

    @rule_for("mixed", makes_units=True)
    def follow_mixed(ledger: Ledger, call: Call) -> Tracks:
        return product(ledger, "bi,oi->bo", *call.args, weight=True)

    try:
        assert columns_of(net, torch.randn(1, 3)) == {
            "w": (8, {("w", 0, 1, 1, "in"), ("v", 1, 1, 1, "out")}),
            "v": (6, {("v", 0, 1, 1, "in"), ("b.weight", 1, 1, 1, "out")}),
        }
    finally:
        del RULES["mixed"]


def test_a_wrong_rule_makes_no_population() -> None:
    net = Fn(
        lambda m, x: m.b(mixed(m.a(x), m.w)), a=nn.Linear(3, 8), w=nn.Parameter(torch.randn(8, 8)), b=nn.Linear(8, 2)
    )

    @rule_for("mixed")
    def follow_mixed(ledger: Ledger, call: Call) -> Tracks:
        return ledger.state(call.args[0]).tracks

    try:
        report = find_populations(net, torch.randn(1, 3))
        assert not report.populations and "changes the output" in str(report)
    finally:
        del RULES["mixed"]
