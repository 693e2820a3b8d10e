import subprocess
import sys

import pytest
import torch

import torch_meanfield  # noqa: F401  (registers the models once timm is imported)

timm = pytest.importorskip("timm")


def test_every_sibling_is_registered_and_runs():
    names = timm.list_models("meanfield_*")
    assert names == [
        "meanfield_resnet20", "meanfield_resnet32", "meanfield_resnet44", "meanfield_resnet56", "meanfield_resnet110",
        "meanfield_resnet164", "meanfield_resnext29_8x64d", "meanfield_resnext29_16x64d",
    ]  # fmt: skip
    model = timm.create_model("meanfield_resnet20", num_classes=7, in_chans=1, tau_init="random")
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert model.default_cfg["input_size"] == (3, 32, 32)
    assert timm.create_model("meanfield_resnet164", learn_tau=False).depth == 164


def test_features_only():
    model = timm.create_model("meanfield_resnet20", features_only=True)
    assert model.feature_info.channels() == [16, 32, 64] and model.feature_info.reduction() == [1, 2, 4]
    assert [f.shape[1] for f in model(torch.randn(1, 3, 32, 32))] == [16, 32, 64]
    last = timm.create_model("meanfield_resnet20", features_only=True, out_indices=[-1])
    assert [f.shape[1] for f in last(torch.randn(1, 3, 32, 32))] == [64]


def test_timm_groups_the_parameters():
    from timm.models._manipulate import group_parameters
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    model = timm.create_model("meanfield_resnet20")
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    first, last = groups["stem.weight"], groups["stage3.particles.1.conv2.weight"]
    assert first < groups["stage1.particles.0.conv1.weight"] < groups["stage1.particles.2.conv1.weight"] < last
    undecayed = param_groups_weight_decay(model, 1e-4, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for g in undecayed if g["weight_decay"] for p in g["params"]}
    assert id(model.stage1.particles.tau_axis.offset) not in decayed and id(model.stem.weight) in decayed
    assert sum(len(g["params"]) for g in param_groups_layer_decay(model)) == len(list(model.parameters()))


@pytest.mark.parametrize("first, second", [("torch_meanfield", "timm"), ("timm", "torch_meanfield")])
def test_either_import_may_come_first(first, second):
    code = f"import {first}, {second}, timm; assert timm.is_model('meanfield_resnet20'); import timm.layers"
    subprocess.run([sys.executable, "-c", code], check=True)
