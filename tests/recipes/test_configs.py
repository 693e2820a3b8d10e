"""Every configuration runs on a data set of its own layout, and the eight rows are the published protocol."""

import pytest
import yaml

from recipes.images.cli import CONFIGS
from torch_meanfield import MeanFieldResNet

FILES = sorted(path.name for path in CONFIGS.glob("*.yaml"))
ONLINE = {"cifar10": "cifar10_online", "cifar100": "cifar100_online", "fashion-mnist": "fashion_mnist_online"}
# Lu et al. 2020, section 5 and Table 1: depth, block, cardinality, weight decay, epochs, millions of parameters.
ROWS = {
    "resnet20-cifar10": (20, "basic", 8, 1e-4, 160, 0.27),
    "resnet32-cifar10": (32, "basic", 8, 1e-4, 160, 0.46),
    "resnet44-cifar10": (44, "basic", 8, 1e-4, 160, 0.66),
    "resnet56-cifar10": (56, "basic", 8, 1e-4, 160, 0.85),
    "resnet110-cifar10": (110, "basic", 8, 1e-4, 160, 1.7),
    "resnet164-cifar10": (164, "bottleneck", 8, 1e-4, 160, 1.7),
    "resnext29-8x64d-cifar100": (29, "resnext", 8, 5e-4, 300, 34.4),
    "resnext29-16x64d-cifar100": (29, "resnext", 16, 5e-4, 300, 68.1),
}


@pytest.mark.parametrize("config", FILES)
def test_every_configuration_runs_on_its_data_set(cifar, request, config):
    name = yaml.safe_load((CONFIGS / config).read_text())["data"]["name"]
    if name in ONLINE:
        request.getfixturevalue(ONLINE[name])
    small = ["--data.batch_size", 2, "--data.eval_batch_size", 2]
    cli = cifar("fit", "--config", CONFIGS / config, "--trainer.fast_dev_run", "true", *small)
    assert cli.trainer.global_step == 1
    assert cli.datamodule.source.name == name


def test_there_is_one_configuration_for_each_published_row():
    assert {f"{row}.yaml" for row in ROWS} == set(FILES) - {"digits.yaml", "resnet20-fashion-mnist.yaml"}


@pytest.mark.parametrize("row", ROWS)
def test_a_published_row_has_the_published_protocol(cifar, capsys, row):
    depth, block, cardinality, decay, epochs, millions = ROWS[row]
    with pytest.raises(SystemExit) as ended:
        cifar("fit", "--config", CONFIGS / f"{row}.yaml", "--print_config")
    assert not ended.value.code
    config = yaml.safe_load(capsys.readouterr().out)
    model, data, trainer = config["model"], config["data"], config["trainer"]
    assert (model["depth"], model["block"], model["cardinality"]) == (depth, block, cardinality)
    assert (model["lr"], model["momentum"], model["weight_decay"]) == (0.1, 0.9, decay)
    assert (data["name"], data["batch_size"], trainer["max_epochs"]) == (row.rsplit("-", 1)[1], 128, epochs)
    # Nothing that the protocol does not have: no validation images held back, no smoothing, no averages.
    assert (data["val_fraction"], data["augment"], data["padding"], data["mirror"]) == (0.0, True, None, None)
    off = ("label_smoothing", "mixup", "drop_rate", "ema", "birth_death", "compile", "channels_last")
    assert not any(model[option] for option in off)
    assert not any(trainer[option] for option in ("precision", "gradient_clip_val"))
    assert trainer["accumulate_grad_batches"] == 1
    saved = [c["init_args"] for c in trainer["callbacks"] if c["class_path"].endswith("ModelCheckpoint")]
    assert [(c["filename"], c["monitor"]) for c in saved] == [("best", "val_error"), ("last", None)]
    assert all(c["save_on_train_epoch_end"] for c in saved)
    classes = 100 if data["name"] == "cifar100" else 10
    net = MeanFieldResNet(depth, classes, 3, block, cardinality=cardinality, base_width=model["base_width"])
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)
