"""Small models of a handful of timm families: what is claimed is proven, literally and one by one.

The smallest model of every model file: ``tools/populations_zoo.py``.
"""

from __future__ import annotations

import pytest
import torch

from torch_meanfield.width.search.find import find_populations
from torch_meanfield.width.search.proof import verify

timm = pytest.importorskip("timm")

# name -> (input size, populations, tensors that make units of one of them)
MODELS = {
    "test_vit": (32, 12, "blocks.0.attn.qkv.weight"),
    "test_convnext": (32, 8, "stages.0.blocks.0.mlp.fc1.weight"),
    "test_efficientnet": (32, 8, "blocks.1.0.conv_exp.weight"),
    "test_resnet": (32, 7, "layer1.0.conv1.weight"),
    "test_nfnet": (32, 8, "stages.0.0.conv1.weight"),
    "mobilenetv3_small_050": (64, 20, "blocks.1.0.conv_pw.weight"),
    "regnetx_002": (32, 13, "s1.b1.conv1.conv.weight"),
    "beit_base_patch16_224": (32, 24, "blocks.0.attn.qkv.weight"),
    "xcit_nano_12_p16_224": (64, 24, "blocks.0.attn.qkv.weight"),
    "resnest14d": (64, 8, "layer1.0.conv1.weight"),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_claim_is_proven(name: str) -> None:
    size, least, one = MODELS[name]
    arguments = {"depth": 2, "embed_dim": 48, "num_heads": 3} if name.startswith("beit") else {}
    if "vit" in name or "beit" in name:
        arguments["img_size"] = size
    if arguments.get("depth"):
        least = 4
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments)
    example = torch.randn(1, 3, size, size)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    report = find_populations(model, example)
    assert len(report) >= least, str(report)
    assert one in {p.name for p in report}, str(report)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    sample = report.populations[:: max(len(report) // 8, 1)]
    verdicts = verify(model, example, sample, seed=1)
    assert all(v.proven for v in verdicts), [str(v) for v in verdicts if not v.proven]


def test_the_stream_of_a_vision_transformer_is_refused_by_name() -> None:
    model = timm.create_model("test_vit", img_size=32)
    report = find_populations(model, torch.randn(1, 3, 32, 32))
    assert [r.name for r in report.refused if "residual stream" in r.reason] == ["patch_embed.proj.weight"]
    claimed = {id(c.tensor): c.dim for p in report for c in p.incoming}
    assert all(claimed.get(id(b.mlp.fc2.weight)) is None for b in model.blocks)
