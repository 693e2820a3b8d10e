import subprocess
import sys

import pytest
import torch

timm = pytest.importorskip("timm")
pytest.importorskip("torch_meanfield.models.timm")  # registers them


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
    assert timm.create_model("meanfield_resnet20", blocks=(4, 3, 6)).blocks == (4, 3, 6)


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


def test_only_the_import_of_the_module_registers():
    code = """
import timm, torch_meanfield
assert not timm.is_model("meanfield_resnet20")
import torch_meanfield.models.timm
assert timm.is_model("meanfield_resnet20")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_script_finds_the_models_in_a_process_that_has_imported_them(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import sys, timm\nprint(type(timm.create_model(sys.argv[1])).__name__)\n")
    run = f"import runpy, torch_meanfield.models.timm; runpy.run_path({str(script)!r}, run_name='__main__')"
    command = [sys.executable, "-c", run, "meanfield_resnet20"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "MeanFieldResNet\n"
