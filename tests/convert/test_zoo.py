"""Small models of many timm files: equality, re-sorting and folding, as ``benchmarks/zoo.py`` checks every file."""

from __future__ import annotations

import warnings

import pytest
import torch

from benchmarks.zoo import Timm, numbers

timm = pytest.importorskip("timm")

# name -> particles, on the smallest input of the benchmark
MODELS = {
    "test_vit": 6, "test_convnext": 8, "resnet18": 2, "resnetv2_18": 2, "legacy_seresnet18": 2, "skresnet18": 2,
    "regnetx_002": 9, "gernet_s": 8, "ghostnet_050": 4, "repghostnet_050": 4, "mobilenetv3_small_050": 6,
    "hardcorenas_b": 7, "starnet_s050": 3, "fasternet_t0": 12, "test_mambaout": 3, "convit_tiny": 12,
    "edgenext_xx_small": 7, "mobilevit_xxs": 11, "levit_128s": 9, "pit_ti_224": 12, "test_vit_relpos": 9,
    "efficientvit_b0": 4, "cpubone_nano": 2, "inception_next_atto": 12, "deit_tiny_patch16_224": 12,
    "vit_tiny_patch16_dinov3_qkvb": 12, "dla46x_c": 4, "swiftformer_xs": 12, "xcit_nano_12_p8_224": 12,
    "pvt_v2_b0": 8,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_everything_holds(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's own
        row = numbers(lambda **a: Timm().build(name, **a), (64,), 3)
    assert row["verdict"] == "converted", row["reason"]
    assert row["checked"] == "passed"
    assert row["particles"] == MODELS[name]
    assert row["foldable"] == row["branches"]
    assert torch.get_default_dtype() == torch.float32
