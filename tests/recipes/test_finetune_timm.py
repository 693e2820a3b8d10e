"""The fine-tuning command as its users give it: configurations, what a run leaves, resuming, and bad input."""

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml

from recipes.finetune import export as finetune_export
from recipes.finetune.task import FinetuneTask
from recipes.finetune_timm import long_form, main
from recipes.images.cli import CONFIGS

# Layer scales of 1, since those of 1e-6 would hide the branches, and tau with them.
TINY = '{"patch_size": 1, "depths": [1, 1, 3, 1], "dims": [8, 8, 16, 16], "ls_init_value": 1.0}'
QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")
QUICK = ("--size", "8", "--model.kwargs", TINY, "--trainer.log_every_n_steps", "1", "--data.batch_size", "256", *QUIET)


@pytest.fixture
def finetune(monkeypatch, tmp_path):
    """Run ``recipes/finetune_timm.py`` with these arguments, in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["finetune_timm.py", *map(str, args)])
        return main()

    return run


def tiny(**more):
    torch.manual_seed(7)
    return timm.create_model("convnext_atto", in_chans=1, **{"num_classes": 10, **json.loads(TINY), **more})


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        ("fit", "fit --config C/digits.yaml"),
        ("fit --data=digits", "fit --config C/digits.yaml --data.name digits"),
        (
            "fit --model resnet50 --pretrained",
            "fit --config C/digits.yaml --model.name resnet50 --model.pretrained true",
        ),
        ("fit --data cifar10 --plain", "fit --config C/adamw.yaml --data.name cifar10 --model.mean_field false"),
        ("fit -c a.yaml --checkpoint f.pt --size=32", "fit -c a.yaml --model.checkpoint f.pt --data.size=32"),
        ("fit -c a.yaml --model=b --data d.yaml", "fit -c a.yaml --model.name=b --data d.yaml"),
        ("fit -c a.yaml --model b.yaml", "fit -c a.yaml --model b.yaml"),
        ("fit --help", "fit --help"),
        ("", ""),
    ],
)
def test_short_forms_are_spelled_out(given, spelled):
    expected = spelled.replace("C/", f"{CONFIGS}/finetune/").split()
    assert long_form(given.split()) == expected
    assert long_form(expected) == expected


@pytest.mark.parametrize("config", sorted(path.name for path in (CONFIGS / "finetune").glob("*.yaml")))
@pytest.mark.parametrize("plain", [False, True])
def test_every_configuration_runs_on_digits(finetune, config, plain):
    path = CONFIGS / "finetune" / config
    small = {"sgd.yaml": ["--data.batch_size", "8"], "digits.yaml": ["--data.batch_size", "8"]}
    more = small.get(config, ["--size", "32", "--data.batch_size", "8"])
    cli = finetune("fit", "-c", path, "--data", "digits", "--trainer.fast_dev_run", "true", *more, *["--plain"] * plain)
    assert cli.trainer.global_step == 1
    assert cli.exported == {"file": None, "error": pytest.approx(0, abs=1e-4), "folded": not plain}
    assert set(yaml.safe_load(path.read_text())["model"]) <= set(cli.config["fit"]["model"].as_dict())


def test_a_run_leaves_a_plain_checkpoint_that_timm_loads_and_that_classifies_as_the_run_did(finetune, tmp_path):
    cli = finetune("fit", "--trainer.max_epochs", 2, "--model.lr", 3e-3, "--model.tau_lr_scale", 30, *QUICK)
    folder = tmp_path / "runs" / "digits" / "version_0"
    run = json.loads((folder / "run.json").read_text())
    (steps,) = run["steps"].values()
    assert len(steps) == 3 and steps != [1.0, 1.0, 1.0]  # something had to be folded
    assert run["plain_checkpoint"]["folded"] and run["plain_checkpoint"]["error"] < 1e-4

    plain = tiny()
    plain.load_state_dict(torch.load(folder / "plain.pt", weights_only=True), strict=True)
    batch = next(iter(cli.datamodule.test_dataloader()))
    images, labels = cli.datamodule.on_after_batch_transfer(batch, 0)
    with torch.no_grad():
        logits = plain.eval()(images)
    assert torch.allclose(logits, cli.model.eval()(images), rtol=1e-4, atol=1e-4)
    error = 100 * float((logits.argmax(1) != labels).float().mean())
    assert error == pytest.approx(run["epochs"][-1]["val_error"], abs=0.21)  # 500 images: one more or less

    # The mean and deviation to normalise by are what whoever uses plain.pt needs beside it.
    mean, std = run["normalised_by"]["mean"][0], run["normalised_by"]["std"][0]
    pixels = cli.datamodule.source.decode("test").pixels[: len(images)]
    assert torch.allclose(images, (pixels / 255 - mean) / std, atol=1e-5)

    checkpoint = folder / "checkpoints" / "last.ckpt"
    tested = finetune("test", "-c", folder / "config.yaml", "--ckpt_path", checkpoint)
    assert float(tested.trainer.callback_metrics["test_error"]) == pytest.approx(run["epochs"][-1]["val_error"])


def test_plain_and_mean_field_are_alike_while_only_the_classifier_learns(finetune):
    """Every step is 1, so that the twins' first phases agree bit for bit: same weights, same batches."""

    def epochs(*args):
        cli = finetune("fit", "--trainer.max_epochs", 2, "--model.kwargs.drop_path_rate", 0.2, *QUICK, *args)
        return cli, json.loads((Path(cli.trainer.log_dir) / "run.json").read_text())["epochs"]

    (_, plain), (cli, mean_field) = epochs("--plain"), epochs()
    assert plain[0] == mean_field[0]
    assert plain[1]["train_loss"] == pytest.approx(mean_field[1]["train_loss"], rel=1e-2)
    assert plain[1]["train_loss"] != mean_field[1]["train_loss"]
    assert all(p.requires_grad for p in cli.model.net.parameters())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("broken_at", [1, 2])  # as the second phase begins, and within it
def test_a_resumed_run_ends_where_an_unbroken_one_does(finetune, tmp_path, monkeypatch, broken_at):
    args = ["fit", "--trainer.max_epochs", 3, *QUICK]
    unbroken = finetune(*args).model.net.state_dict()

    begin = FinetuneTask.on_train_epoch_start

    def breaks(task):
        begin(task)
        if task.current_epoch == broken_at:
            raise ConnectionAbortedError("pulled the plug")

    with monkeypatch.context() as patched, pytest.raises(ConnectionAbortedError):
        patched.setattr(FinetuneTask, "on_train_epoch_start", breaks)
        finetune(*args)
    checkpoint = tmp_path / "runs" / "digits" / "version_1" / "checkpoints" / "last.ckpt"
    resumed = finetune(*args, "--ckpt_path", checkpoint).model.net.state_dict()
    assert all(torch.equal(unbroken[k], resumed[k]) for k in unbroken)


def test_sgd_and_channels_last(finetune):
    options = ["--model.optimizer", "sgd", "--model.channels_last", "true", "--model.head_lr", 0.1]
    cli = finetune("fit", "--trainer.max_epochs", 2, *QUICK, *options)
    optimizer = cli.trainer.optimizers[0]
    assert isinstance(optimizer, torch.optim.SGD)
    assert {g["name"] for g in optimizer.param_groups} >= {"layers0", "tau"}
    assert cli.model.net.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert cli.exported["error"] < 1e-4


def test_birth_and_death_rest_while_only_the_classifier_learns_and_then_replace_a_dead_unit(finetune, tmp_path):
    weights = tiny().state_dict()
    mlp = "stages.2.blocks.1.mlp."
    for name, row in (("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", (slice(None), 0))):
        weights[mlp + name][row] = 0
    torch.save(weights, tmp_path / "dead.pt")
    options = ["--checkpoint", "dead.pt", "--model.birth_death", "true", "--model.birth_death_every", 3]
    cli = finetune("fit", "--trainer.max_epochs", 2, *QUICK, *options)
    assert cli.trainer.optimizers[0].clock == cli.trainer.global_step / 2
    assert cli.model.born >= 1
    assert cli.model.net.get_parameter(mlp + "fc1.weight")[0].any()
    assert json.loads((Path(cli.trainer.log_dir) / "run.json").read_text())["born"] == cli.model.born
    assert cli.exported["error"] < 1e-4


def test_bf16_mixed_precision_keeps_tau_in_float32(finetune):
    cli = finetune("fit", "--trainer.precision", "bf16-mixed", "--trainer.max_epochs", 2, *QUICK)
    taus = [p for n, p in cli.model.net.named_parameters() if "tau" in n]
    assert taus and all(p.dtype == torch.float32 for p in taus)
    assert cli.exported["error"] < 1e-4


def _fails(finetune, capfd, args, *parts, code=2):
    with pytest.raises(SystemExit) as ended:
        finetune(*args)
    out, err = capfd.readouterr()
    assert ended.value.code == code
    assert len(err.splitlines()) == 1, err
    assert err.startswith("finetune_timm.py: error: ")
    for part in parts:
        assert part in err
    return out


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--model", "convnext_ato"], ["convnext_ato", "did you mean", "convnext_atto"]),
        (["--model", "vgg11"], ["VGG", "no residual blocks"]),
        (["--model", "inception_v4"], ["inception_v4", "32 pixels", "--size"]),
        (["--model.kwargs", "{colour: 3}"], ["--model.kwargs", "colour"]),
        (["--checkpoint", "nowhere.pt"], ["nowhere.pt", "no such file"]),
        (["--checkpoint", "x.pt", "--pretrained"], ["--pretrained and --checkpoint x.pt"]),
        (["--model.layer_decay", "0"], ["layer_decay 0"]),
        (["--model.lr", "-1"], ["lr -1"]),
        (["--model.head_epochs", "-1"], ["head_epochs -1"]),
        (["--model.tau_lr_scale", "-2"], ["tau_lr_scale -2"]),
        (["--data.classes", "[3]"], ["--data.classes [3]"]),
        (["--data.classes", "[3, 10]"], ["--data.classes [3, 10]", "0 to 9"]),
        (["--size", "0"], ["--size 0"]),
        (["--data", "folder:nowhere"], ["no such folder"]),
        (["--model.deepness", "1"], ["deepness"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(finetune, capfd, tmp_path, args, parts):
    assert _fails(finetune, capfd, ["fit", *args], *parts) == ""
    assert _files(tmp_path) == []


def test_checkpoints_that_do_not_fit_are_refused_by_their_keys(finetune, capfd, tmp_path):
    good = tiny().state_dict()
    torch.save(
        {k: v for k, v in good.items() if k != "stem.0.weight"} | {"extra": torch.zeros(1)}, tmp_path / "keys.pt"
    )
    torch.save(tiny(dims=[8, 8, 16, 24]).state_dict(), tmp_path / "shapes.pt")
    torch.save(tiny(), tmp_path / "pickled.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    before = _files(tmp_path)
    for name, parts in {
        "keys.pt": ["lacks stem.0.weight", "has besides extra"],
        "shapes.pt": ["differs in", "stages.3"],
        "pickled.pt": ["not a readable state dict"],
        "text.pt": ["not a readable state dict"],
    }.items():
        _fails(finetune, capfd, ["fit", "--checkpoint", name, *QUICK], name, *parts)
    assert _files(tmp_path) == before


@pytest.mark.parametrize(
    ("classes", "options", "kept"), [(10, [], True), (7, [], False), (10, ["--model.new_head", "true"], False)]
)
def test_a_checkpoint_is_loaded_and_its_classifier_if_it_fits(finetune, capfd, tmp_path, classes, options, kept):
    theirs = tiny(num_classes=classes).state_dict()
    torch.save(theirs, tmp_path / "theirs.pt")
    cli = finetune("fit", "--checkpoint", "theirs.pt", "--model.lr", 1e-30, "--trainer.max_epochs", 2, *QUICK, *options)
    out = capfd.readouterr().out
    assert (f"classifier of {classes} classes left out" in out) is not kept
    mine = cli.model.net.state_dict()
    assert torch.equal(mine["stem.0.weight"], theirs["stem.0.weight"])
    assert torch.equal(mine["stages.2.blocks.1.mlp.fc2.weight"], theirs["stages.2.blocks.1.mlp.fc2.weight"])
    same_head = mine["head.fc.weight"].shape == theirs["head.fc.weight"].shape
    assert (same_head and torch.equal(mine["head.fc.weight"], theirs["head.fc.weight"])) is kept


def test_phases_that_leave_nothing_are_refused(finetune, capfd):
    _fails(
        finetune,
        capfd,
        ["fit", "--model.head_epochs", 2, "--trainer.max_epochs", 2, *QUICK],
        "head_epochs 2",
        "none of",
    )


def test_a_plain_checkpoint_that_computes_something_else_is_an_error_and_not_written(
    finetune, capfd, tmp_path, monkeypatch
):
    def wrong(net):
        plain = net_fold(net)
        with torch.no_grad():
            plain.head.fc.bias += 1
        return plain

    net_fold = finetune_export.fold
    monkeypatch.setattr(finetune_export, "fold", wrong)
    args = ["fit", "--trainer.max_epochs", 2, *QUICK]
    with pytest.raises(SystemExit) as ended:
        finetune(*args)
    assert ended.value.code == 1
    assert "differs from the trained model" in capfd.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.rglob("plain.pt*"))
