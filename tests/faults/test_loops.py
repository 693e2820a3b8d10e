"""Residual additions that a module makes around its children, and attributes that count the blocks."""

import copy

import pytest
import torch
from torch import nn

from torch_meanfield import conversion_report, convert, fold, resort_, set_automatic_resort


def mlp(width=6):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 9), nn.GELU(), nn.Linear(9, width))


class Attention(nn.Module):
    """With its norm inside, as in vit-pytorch."""

    def __init__(self, width=6, idx=0, gives=None):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layer_idx, self.gives = idx, gives

    def forward(self, x, bias=None):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = (q @ k.mT).softmax(-1) if bias is None else (q @ k.mT + bias).softmax(-1)
        out = self.out(scores @ v)
        return (out, v) if self.gives else out


class Loop(nn.Module):
    """``for attn, ff in self.layers: x = attn(x) + x; x = ff(x) + x`` and a final norm."""

    def __init__(self, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Attention(), mlp()]) for _ in range(depth))
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return self.norm(x)


class TwoLists(Loop):
    """Attention and MLP in lists of their own, in place; the drop is a module of the loop."""

    def __init__(self):
        super().__init__()
        self.attns, self.ffs = (nn.ModuleList(layer[i] for layer in self.layers) for i in (0, 1))
        self.drop = nn.Dropout(0.0)
        del self.layers

    def forward(self, x):
        for attn, ff in zip(self.attns, self.ffs, strict=True):
            x = x + self.drop(attn(x))
            y = ff(x)
            y += x
            x = y
        return self.norm(x)


class NormsInTheLoop(nn.Module):
    """The norm belongs to the block, though another module puts out the branch."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(4))
        self.layers = nn.ModuleDict({f"layer{i}": nn.Linear(6, 6) for i in range(4)})

    def forward(self, x):
        for norm, layer in zip(self.norms, self.layers.values(), strict=True):
            x = x + layer(torch.tanh(norm(x)))
        return x


class Pairs(Loop):
    """The branch is the first of two outputs; a bias that all places share is computed once."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Linear(6, 5)
        for layer in self.layers:
            layer[0] = Attention(gives=True)

    def forward(self, x):
        bias = self.bias(x)
        for attn, ff in self.layers:
            y, _ = attn(x, bias)
            x = x + y
            x = x + ff(x)
        return self.norm(x)


def examples():
    return torch.randn(2, 5, 6)


@pytest.mark.parametrize(
    ("build", "particles"),
    [
        (Loop, [("layers.0.0", "layers.0.1"), ("layers.1.0", "layers.1.1"), ("layers.2.0", "layers.2.1")]),
        (TwoLists, [("attns.0", "ffs.0"), ("attns.1", "ffs.1"), ("attns.2", "ffs.2")]),
        (NormsInTheLoop, [(f"norms.{i}", f"layers.layer{i}") for i in range(4)]),
        (Pairs, [("layers.0.0", "layers.0.1"), ("layers.1.0", "layers.1.1"), ("layers.2.0", "layers.2.1")]),
        (lambda: nn.Sequential(nn.Linear(6, 6), Loop()), None),
    ],
)
def test_additions_in_a_loop_are_found_and_converted(build, particles):
    model, x = build(), examples()
    plain = copy.deepcopy(model)
    convert(model, x)
    (stage,) = conversion_report(model)
    assert particles is None or list(stage.particles) == particles
    assert torch.equal(model(x), plain(x))
    model(x).square().mean().backward()
    plain(x).square().mean().backward()
    assert all(torch.equal(p.grad, model.get_parameter(n).grad) for n, p in plain.named_parameters())
    assert stage.module.tau_axis.offset.grad.abs().min() > 0

    before = [[t.detach().clone() for t in column.tensors] for column in stage.module.population().columns[:-2]]
    steps = torch.rand(len(stage.module)) + 0.5
    stage.module.set_tau_(steps.cumsum(0))
    expected, folded = model(x), fold(model)
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5)
    fresh = build()
    fresh.load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(fresh(x), folded(x)) and not torch.allclose(expected, plain(x), atol=1e-3)

    with torch.no_grad():  # the first passes the second: everything of both changes places
        stage.module.tau_axis.offset[0] += float(steps[1]) + 0.1
    resort_(model)
    for column, (first, second, *_) in zip(stage.module.population().columns[:-2], before, strict=True):
        assert torch.equal(column.tensors[0], second) and torch.equal(column.tensors[1], first)


@pytest.mark.parametrize("build", [Loop, NormsInTheLoop, Pairs])
def test_the_whole_block_runs_when_it_is_its_turn(build):
    model, x = convert(build(), examples()), examples()
    (stage,) = conversion_report(model)
    set_automatic_resort(model, False)
    with torch.no_grad():
        stage.module.tau_axis.offset[0] += 1.6
    unsorted = model(x)
    resort_(model)
    torch.testing.assert_close(unsorted, model(x))


class SharedNorm(nn.Module):
    """Two branches read one norm, which must not be left behind."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(6), mlp(), mlp()]) for _ in range(3))

    def forward(self, x):
        for norm, a, b in self.layers:
            h = norm(x)
            x = x + a(h)
            x = x + b(h)
        return x


class OwnBias(Pairs):
    """What stays at the place differs from place to place."""

    def forward(self, x):
        for i, (attn, ff) in enumerate(self.layers):
            x = x + attn(x, self.bias(x) if i else None)[0]
            x = x + ff(x)
        return x


class ReadLater(Loop):
    """The values of each attention go into the next."""

    def __init__(self):
        super().__init__()
        for layer in self.layers:
            layer[0] = Attention(gives=True)

    def forward(self, x):
        v = 0
        for attn, ff in self.layers:
            y, v = attn(x + 0 * v)
            x = x + y
            x = ff(x) + x
        return x


class OwnGain(Loop):
    """A parameter of the loop itself is in each branch."""

    def __init__(self):
        super().__init__()
        self.gains = nn.ParameterList(torch.ones(6) for _ in range(3))

    def forward(self, x):
        for gain, (attn, _) in zip(self.gains, self.layers, strict=True):
            x = x + attn(x * gain)
        return x


class Shared(Loop):
    """One module at all places."""

    def forward(self, x):
        for _ in range(3):
            x = x + self.layers[0][0](x)
        return x


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (SharedNorm, "no module adds a branch to its own input"),
        (OwnBias, "cannot change places"),
        (ReadLater, "what else layers.0.0 puts out is read after"),
        (OwnGain, "reads 'gains.0', which belongs to none"),
        (Shared, "layers.0.0 is called 3 times in one forward pass"),
    ],
)
def test_what_would_be_torn_apart_is_refused(build, words):
    model, x = build(), examples()
    before = model(x)
    with pytest.raises(ValueError, match=words):
        convert(model, x)
    assert torch.equal(model(x), before)


# -- attributes that differ from place to place ---------------------------------------------------------------------


class Cache:
    """Keys of the blocks before, as language models hand from block to block."""

    def __init__(self):
        self.keys = []

    def update(self, key, layer):
        self.keys += [None] * (layer + 1 - len(self.keys))
        old = self.keys[layer]
        self.keys[layer] = key if old is None else torch.cat([old, key], 1)
        return self.keys[layer]


class DecoderLayer(nn.Module):
    """As in Hugging Face's decoders."""

    def __init__(self, idx, scale=None, every=None, when=0):
        super().__init__()
        self.norm, self.q, self.k, self.o = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.layer_idx, self.scale, self.every, self.when = idx, scale, every, when
        self.drop = nn.Dropout(0.2)

    def forward(self, x, cache=None):
        h = self.norm(x)
        k = self.k(h) if cache is None else cache.update(self.k(h), self.layer_idx)
        scores = self.q(h) @ k.mT / (1 + self.layer_idx if self.scale == "inverse" else 1)
        y = self.o(scores.softmax(-1) @ k)
        if self.when and self.training and self.layer_idx >= self.when:
            y = 2 * y
        return x + self.drop(y) * (self.every or 1)


class Decoder(nn.Module):
    def __init__(self, *settings, use_cache=True, first=0):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(first + i, *settings) for i in range(4))
        self.use_cache = use_cache

    def forward(self, x):
        cache = Cache() if self.use_cache else None
        for layer in self.layers:
            x = layer(x, cache)
        return x


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("first", [0, 1])
def test_a_number_that_counts_the_blocks_does_not_forbid(use_cache, first):
    model = convert(Decoder(use_cache=use_cache, first=first), examples())
    assert conversion_report(model).particles == 4


def test_a_number_that_counts_is_refused_where_it_is_used():
    with pytest.raises(ValueError, match="not exchangeable with layers.0.*'layer_idx' differs between them"):
        convert(Decoder("inverse"), examples())
    report = conversion_report(convert(Decoder(None, None, 2), examples()))  # used in train() alone, from layer 2 on
    assert report.stages[0].particles == (("layers.0",), ("layers.1",))
    assert "in training; 'layer_idx' differs between them" in str(report.fixed[0])


def test_other_attributes_forbid_unless_they_are_ignored():
    model = Decoder()
    for i, layer in enumerate(model.layers):
        layer.window = 4 + i % 2
        layer.every = 1 + 0.1 * i
    with pytest.raises(ValueError, match="at 'every' it has 1.0, layers.1 has 1.1"):
        convert(model, examples())
    report = conversion_report(convert(model, examples(), ignore=("every",)))
    assert report.particles == 4 and [layer.every for layer in model.layers] == [1 + 0.1 * i for i in range(4)]
    with pytest.raises(TypeError, match="ignore must be a pattern or several, got 3"):
        convert(Decoder(), examples(), ignore=3)


def test_nothing_is_tried_on_the_meta_device_so_the_name_is_needed():
    with torch.device("meta"):
        model, x = Decoder(), torch.empty(2, 5, 6)
    with pytest.raises(ValueError, match="at 'layer_idx' it has 0"):
        convert(model, x)
    assert conversion_report(convert(model, x, ignore="layer_idx")).particles == 4


def test_an_argument_that_differs_from_place_to_place_forbids():
    class Windowed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Shifted() for _ in range(4))

        def forward(self, x):
            for i, layer in enumerate(self.layers):
                x = layer(x, shift=i % 2)
            return x

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x, shift):
            return x + self.inner(x.roll(shift, 1))

    (stage,) = conversion_report(convert(Windowed(), examples()))
    assert stage.particles == (("layers.0", "layers.1"), ("layers.2", "layers.3"))


# -- the libraries themselves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["vit", "simple_vit", "deepvit", "vit_for_small_dataset", "parallel_vit"])
def test_vit_pytorch(file):
    module = pytest.importorskip(f"vit_pytorch.{file}")
    build = getattr(module, "SimpleViT" if "simple" in file else "DeepViT" if "deep" in file else "ViT")
    model = build(image_size=16, patch_size=8, num_classes=3, dim=16, depth=3, heads=2, mlp_dim=24)
    report = conversion_report(convert(model, torch.randn(1, 3, 16, 16)))
    assert report.particles == 3 and report.branches == 6


def test_hugging_face_decoders():
    hf = pytest.importorskip("transformers")
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3}
    ids = torch.arange(8)[None]
    llama = {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    models = [
        (hf.GPT2Model(hf.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=3, n_head=2)), ids, 3),
        (hf.LlamaModel(hf.LlamaConfig(**small, **llama)), ids, 3),
        (hf.MambaModel(hf.MambaConfig(**small, state_size=4)), ids, 3),
        (
            hf.T5Model(hf.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=3, num_heads=4)),
            {"input_ids": ids, "decoder_input_ids": ids},
            4,
        ),
    ]
    for model, example, particles in models:
        assert conversion_report(convert(model, example)).particles == particles
