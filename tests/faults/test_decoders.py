"""Grouped-query attention and selective state spaces: their units are populations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_meanfield import BirthDeathOptimizer, find_populations
from torch_meanfield.width import verify


class Grouped(nn.Module):
    """Llama's attention: ``heads`` of queries, fewer of keys and values, rotated."""

    def __init__(self, heads=6, shared=2, per_head=4, how="gqa"):
        super().__init__()
        self.heads, self.shared, self.per_head, self.how = heads, shared, per_head, how
        self.q_proj = nn.Linear(8, heads * per_head, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(8, shared * per_head, bias=how == "gqa") for _ in range(2))
        self.o_proj = nn.Linear(heads * per_head, 8, bias=False)
        self.q_norm = nn.RMSNorm(per_head) if how == "normed" else nn.Identity()

    def forward(self, x, mask=None):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, -1, self.per_head).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        q = self.q_norm(q)
        angle = torch.outer(torch.arange(n), torch.tensor([1.0, 0.1])).repeat(1, 2)
        q, k = (t * angle.cos() + torch.cat([-t[..., 2:], t[..., :2]], -1) * angle.sin() for t in (q, k))
        times = self.heads // self.shared
        if self.how == "eager":
            k, v = (t.repeat_interleave(times, 1) for t in (k, v))
            y = (q @ k.mT / 2).softmax(-1) @ v
        elif self.how == "repeat":  # Hugging Face's repeat_kv
            k, v = (t[:, :, None].expand(-1, -1, times, -1, -1).reshape(b, self.heads, n, -1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return x + self.o_proj(y.transpose(1, 2).reshape(b, n, -1))


@pytest.mark.parametrize("how", ["gqa", "eager", "repeat", "normed"])
@pytest.mark.parametrize("shared", [2, 3, 6])
def test_a_head_of_keys_with_its_queries_is_a_unit(how, shared):
    model = nn.Sequential(nn.Linear(8, 8), Grouped(shared=shared, how=how), nn.Linear(8, 3))
    (heads,) = find_populations(model, torch.randn(1, 5, 8))
    attention = model[1]
    assert heads.size == shared
    inner = {id(c.tensor): c.inner for c in heads.slices(heads.columns)}
    assert inner[id(attention.q_proj.weight)] == 24 // shared and inner[id(attention.k_proj.weight)] == 4
    assert inner[id(attention.v_proj.weight)] == 4 and inner[id(attention.o_proj.weight)] == 24 // shared
    assert verify(model, torch.randn(1, 5, 8), [heads])[0].proven


def test_one_head_of_keys_for_all_is_no_population():
    report = find_populations(nn.Sequential(nn.Linear(8, 8), Grouped(shared=1), nn.Linear(8, 3)), torch.randn(1, 5, 8))
    assert not any("k_proj" in p.name or "q_proj" in p.name for p in report)


class Scan(nn.Module):
    """A Mamba mixer, its recurrence written out; as in Hugging Face's reference."""

    def __init__(self, width=6, inner=8, states=3, rank=2):
        super().__init__()
        self.states, self.rank, self.norm = states, rank, nn.LayerNorm(width)
        self.in_proj, self.out_proj = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 3, padding=2, groups=inner)
        self.x_proj, self.dt_proj = nn.Linear(inner, rank + 2 * states, bias=False), nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.rand(inner, states))
        self.D = nn.Parameter(torch.ones(inner))

    def forward(self, x):
        h, gate = self.in_proj(self.norm(x)).transpose(1, 2).chunk(2, 1)
        h = F.silu(self.conv1d(h)[..., : x.shape[1]])
        dt, b, c = self.x_proj(h.transpose(1, 2)).split([self.rank, self.states, self.states], -1)
        dt = F.softplus(self.dt_proj(dt)).transpose(1, 2)
        a = torch.exp(-self.A_log.exp()[None, :, None] * dt[..., None])
        fed = dt[..., None] * b[:, None] * h[..., None]
        state, outputs = torch.zeros_like(fed[:, :, 0]), []
        for i in range(x.shape[1]):
            state = a[:, :, i] * state + fed[:, :, i]
            outputs.append((state @ c[:, i, :, None])[..., 0])
        y = (torch.stack(outputs, -1) + h * self.D[None, :, None]) * F.silu(gate)
        return x + self.out_proj(y.transpose(1, 2))


def test_the_channels_of_a_scan_are_a_population():
    model, x = nn.Sequential(Scan(), Scan(), nn.Linear(6, 2)), torch.randn(2, 5, 6)
    report = find_populations(model, x)
    assert [(p.name, p.size, len(p.columns)) for p in report] == [(f"{i}.in_proj.weight", 8, 9) for i in (0, 1)]
    assert all(v.proven for v in verify(model, x, report.populations))
    optimizer = BirthDeathOptimizer(torch.optim.Adam(model.parameters()), model, every=3, reinject=0.3)
    born = []
    optimizer.register_event_hook(lambda event: born.extend(event.born.tolist()))
    for _ in range(7):
        before = model(x)
        before.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert bool(model(x).isfinite().all())
    assert born


def test_a_true_stream_is_still_none():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = nn.Linear(8, 5), nn.Linear(5, 8)

        def forward(self, x):
            return x + self.g(self.f(x).relu())

    report = find_populations(nn.Sequential(nn.Linear(3, 8), Block(), Block(), nn.Linear(8, 2)), torch.randn(1, 3))
    assert [p.size for p in report] == [5, 5]
    assert [str(r) for r in report.refused if r.name == "0.weight"] == [
        "0.weight: is the residual stream: added to what it was computed from"
    ]


def test_hugging_face():
    hf = pytest.importorskip("transformers")
    small, ids = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2}, torch.arange(6)[None]
    grouped = {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    for kind in (hf.LlamaConfig(**small, **grouped), hf.Qwen3Config(**small, **grouped, head_dim=4)):
        report = find_populations(hf.AutoModel.from_config(kind), ids)
        assert [p.size for p in report] == [2, 24, 2, 24]
    report = find_populations(hf.MambaModel(hf.MambaConfig(**small, state_size=4)), ids)
    assert [p.size for p in report] == [32, 32]
