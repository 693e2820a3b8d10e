"""What timm's own tests and its ``train.py`` ask of a model."""

import copy
import subprocess
import sys

import pytest
import torch

timm = pytest.importorskip("timm")
pytest.importorskip("torch_meanfield.models.timm")  # registers them

NAME = "meanfield_resnet20"


def images(side=16):
    return torch.randn(2, 3, side, side)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
def test_the_arguments_of_train_py(pool):
    """As ``create_model`` is called there; what is ``None`` is not passed on."""
    model = timm.create_model(
        NAME, pretrained=False, in_chans=3, num_classes=7, drop_rate=0.1, drop_path_rate=None, drop_block_rate=None,
        global_pool=pool, bn_momentum=None, bn_eps=None, scriptable=False, checkpoint_path=None,
    )  # fmt: skip
    assert model(images()).shape == (2, 7) and model.global_pool == pool and model.drop_rate == 0.1
    features = model.eval().forward_features(images())
    both = [features.mean((2, 3)), features.amax((2, 3))]
    expected = {"avg": both[0], "max": both[1], "avgmax": sum(both) / 2}[pool]
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected)


def test_default_configuration_head_and_pooling():
    model = timm.create_model(NAME).eval()
    cfg = model.default_cfg
    assert (model.num_classes, model.num_features, model.head_hidden_size) == (10, 64, 64)
    features = model.forward_features(torch.randn(1, *cfg["input_size"]))
    assert tuple(features.shape[2:]) == cfg["pool_size"] and features.shape[1] == model.num_features
    assert f"{cfg['classifier']}.weight" in model.state_dict() and f"{cfg['first_conv']}.weight" in model.state_dict()
    assert model.get_classifier() is model.get_submodule(model.get_classifier(name_only=True))
    model.reset_classifier(0)
    assert model.num_classes == 0 and model(images()).shape == (2, 64)
    model.reset_classifier(0, "")
    assert model(images()).shape == (2, 64, 4, 4)
    unpooled = timm.create_model(NAME, num_classes=0, global_pool="")
    assert unpooled(images()).shape == (2, 64, 4, 4)
    model.reset_classifier(3, "max")
    assert model(images()).shape == (2, 3)


def test_intermediates_and_features_only():
    model = timm.create_model(NAME).eval()
    last, maps = model.forward_intermediates(images())
    assert torch.isfinite(last).all() and [m.shape[1] for m in maps] == [16, 32, 64]
    only = model.forward_intermediates(images(), indices=[0], stop_early=True, intermediates_only=True)
    assert [tuple(m.shape) for m in only] == [(2, 16, 16, 16)]
    getter = timm.create_model(NAME, features_only=True, out_indices=(1, 2))
    assert getter.feature_info.channels() == [32, 64] and [m.shape[1] for m in getter(images())] == [32, 64]
    model.set_grad_checkpointing()
    x = images()
    torch.testing.assert_close(model(x), timm_copy(model)(x))


def timm_copy(model):
    plain = copy.deepcopy(model)
    plain.set_grad_checkpointing(False)
    return plain


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"global_pool": "median"}, "global_pool must be one of '', 'avg', 'max', 'avgmax', got 'median'"),
        ({"global_pool": ""}, "0 without pooling; got 10 with ''"),
        ({"num_classes": -1}, "num_classes must be an integer of at least 0"),
    ],
)
def test_what_does_not_exist_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(NAME, **given)


# The lines of timm's train.py (August 2026) that come before it makes the model.
TRAIN = """
import argparse, importlib
from timm.models import create_model

parser = argparse.ArgumentParser()
parser.add_argument("data_dir")
parser.add_argument("--model", default="resnet50")
parser.add_argument("--gp", default=None)
parser.add_argument("--num-classes", type=int, default=None)
parser.add_argument("--device-modules", default=None, type=str, nargs="+")
args = parser.parse_args()
if args.device_modules:
    for module in args.device_modules:
        importlib.import_module(module)
model = create_model(args.model, num_classes=args.num_classes, global_pool=args.gp)
print(type(model).__name__, model.num_classes, model.global_pool)
"""


@pytest.mark.parametrize("order", [0, 1])
def test_train_py_takes_our_models_with_no_line_edited(tmp_path, order):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    ours = ["--device-modules", "torch_meanfield.models.timm"]
    rest = ["--model", NAME, "--gp", "avg", "--num-classes", "5"]
    command = [sys.executable, str(script), "DATA", *(ours + rest if order else rest + ours)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "MeanFieldResNet 5 avg\n"
    failed = subprocess.run([sys.executable, str(script), "DATA", *rest], capture_output=True, text=True)
    assert failed.returncode and "Unknown model" in failed.stderr
