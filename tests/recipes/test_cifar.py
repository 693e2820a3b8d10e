"""The command as its users give it: every configuration, the run's files, a resumed run, and bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from recipes.cifar import main
from recipes.cli import CONFIGS, spelled_out

ROOT = Path(__file__).resolve().parents[2]
QUICK = (
    *("--model.depth", "8", "--trainer.log_every_n_steps", "1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
)


@pytest.fixture
def cifar(monkeypatch, tmp_path):
    """Run ``recipes/cifar.py`` with these arguments, in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["cifar.py", *map(str, args)])
        return main()

    return run


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        ("fit --data digits", "fit --config C/digits.yaml --data.name digits"),
        ("fit", "fit --config C/digits.yaml"),
        ("fit --data=cifar10 --model.lr 1", "fit --config C/resnet20-cifar10.yaml --data.name cifar10 --model.lr 1"),
        ("test --data folder:a/b", "test --config C/resnet20-cifar10.yaml --data.name folder:a/b"),
        ("fit --data.name fashion-mnist", "fit --config C/resnet20-fashion-mnist.yaml --data.name fashion-mnist"),
        ("fit -c mine.yaml --data digits", "fit -c mine.yaml --data.name digits"),
        ("fit --config=mine.yaml", "fit --config=mine.yaml"),
        ("fit --config mine.yaml --data mine-data.yaml", "fit --config mine.yaml --data mine-data.yaml"),
        ("fit --help", "fit --help"),
        ("--help", "--help"),
        ("", ""),
    ],
)
def test_the_data_set_is_named_and_chooses_the_configuration(given, spelled):
    expected = spelled.replace("C/", f"{CONFIGS}/").split()
    assert spelled_out(given.split()) == expected
    assert spelled_out(expected) == expected


ONLINE = {"resnet20-cifar10.yaml": "cifar10_online", "resnet20-fashion-mnist.yaml": "fashion_mnist_online"}


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_every_configuration_runs_on_its_data_set(cifar, request, config):
    if config in ONLINE:
        request.getfixturevalue(ONLINE[config])
    cli = cifar("fit", "--config", CONFIGS / config, "--trainer.fast_dev_run", "true")
    assert cli.trainer.global_step == 1
    assert cli.datamodule.source.name == yaml.safe_load((CONFIGS / config).read_text())["data"]["name"]


def test_cifar100_takes_its_classes_from_the_data(cifar, cifar100_online):
    cli = cifar("fit", "--data", "cifar100", "--trainer.fast_dev_run", "true", *QUICK)
    assert cli.model.net.num_classes == 100


def test_a_run_leaves_logs_curves_picture_and_checkpoints_and_test_reads_them(cifar, tmp_path):
    cli = cifar("fit", "--data", "digits", "--trainer.max_epochs", 2, *QUICK)
    folder = tmp_path / "runs" / "digits" / "version_0"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    expected = {"config.yaml", "metrics.csv", "run.json", "tau.png", "checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    assert expected <= names
    assert any("tfevents" in name for name in names)

    run = json.loads((folder / "run.json").read_text())
    assert [e["epoch"] for e in run["epochs"]] == [0, 1]
    last = run["epochs"][-1]
    assert {"train_loss", "train_error", "val_loss", "val_error"} <= set(last)
    assert last["val_error"] == pytest.approx(float(cli.trainer.callback_metrics["val_error"]))
    assert 0 <= last["val_error"] <= 100
    assert (run["data"], run["seed"], run["optimizer_steps"], run["resorts"]) == ("digits", 0, 22, 0)
    assert run["model"]["depth"] == 8
    assert run["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"device", "commit", "seconds"} <= set(run)
    header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"tau/net.stage1.particles/0", "step/net.stage1.particles/0", "resorts/total"} <= set(header)

    # The run's own configuration describes the network, and the test images are what `fit` evaluated on.
    checkpoint = folder / "checkpoints" / "last.ckpt"
    tested = cifar("test", "--config", folder / "config.yaml", "--ckpt_path", checkpoint)
    assert float(tested.trainer.callback_metrics["test_error"]) == pytest.approx(last["val_error"])
    validated = cifar("validate", "--data", "digits", "--ckpt_path", checkpoint, *QUICK)
    assert float(validated.trainer.callback_metrics["val_error"]) == pytest.approx(last["val_error"])
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["digits"]
    assert [path.name for path in (tmp_path / "runs" / "digits").iterdir()] == ["version_0"]


def test_one_seed_gives_one_result_and_the_vanilla_twin_is_one_option(cifar, image_folder):
    def losses(*args):
        data = ("--data", f"folder:{image_folder}", "--data.label", "small")
        cli = cifar("fit", *data, "--trainer.max_epochs", 2, *QUICK, *args)
        assert Path(cli.trainer.log_dir).parts[:2] == ("runs", "small")
        return cli.trainer.callback_metrics["train_loss"], cli.model.net

    first, again, other = losses(), losses(), losses("--seed_everything", 1)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    _, vanilla = losses("--model.learn_tau", "false")
    assert not any("tau" in name for name, _ in vanilla.named_parameters())


def _fails(cifar, capfd, args, *parts):
    with pytest.raises(SystemExit) as ended:
        cifar(*args)
    out, err = capfd.readouterr()
    assert ended.value.code == 2
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("cifar.py: error: ")
    for part in parts:
        assert part in lines[0]


def _written(folder):
    return sorted(path for path in folder.rglob("*") if "web" not in path.parts)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["fit", "--data", "mnist"], ["'mnist' is unknown", "digits, cifar10"]),
        (["fit", "--data", "folder:nowhere"], ["folder:nowhere", "no such folder"]),
        (["fit", "--data", "folder:."], ["folder:.", "no train/ and no test/"]),
        (["fit", "--model.depth", "21"], ["depth", "21", "6k + 2"]),
        (["fit", "--model.horizon", "-1"], ["horizon", "-1"]),
        (["fit", "--model.lr", "-1"], ["lr", "-1"]),
        (["fit", "--model.deepness", "20"], ["model.deepness"]),
        (["fit", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["test", "--ckpt_path", "nowhere.ckpt"], ["nowhere.ckpt", "no such file"]),
        (["fit", "--trainer.accelerator", "abacus"], ["accelerator", "abacus"]),
        (["dance"], ["dance", "fit"]),
        ([], ["fit"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(cifar, capfd, tmp_path, args, parts):
    _fails(cifar, capfd, args, *parts)
    assert _written(tmp_path) == []


def test_a_damaged_checkpoint_and_one_of_another_network_are_refused(cifar, capfd, tmp_path):
    cifar("fit", "--data", "digits", "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 1, *QUICK)
    good = tmp_path / "runs" / "digits" / "version_0" / "checkpoints" / "last.ckpt"
    (tmp_path / "cut.ckpt").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save([1, 2], tmp_path / "list.ckpt")
    before, capture = _written(tmp_path), capfd.readouterr()
    assert "Traceback" not in capture.err
    for name in ("cut.ckpt", "text.ckpt", "list.ckpt"):
        _fails(cifar, capfd, ["fit", "--ckpt_path", name, *QUICK], name, "not a readable checkpoint")
    for subcommand in ("fit", "validate", "test"):
        args = [subcommand, "--ckpt_path", good, "--model.depth", 14]
        _fails(cifar, capfd, args, str(good), "depth 8", "depth 14")
    assert _written(tmp_path) == before


def test_an_unreadable_image_is_named_without_a_traceback(cifar, capfd, image_folder):
    (image_folder / "test" / "dog" / "1.png").write_bytes(b"")
    with pytest.raises(SystemExit) as ended:
        cifar("fit", "--data", f"folder:{image_folder}", "--trainer.max_epochs", 1, *QUICK)
    err = capfd.readouterr().err
    assert ended.value.code == 2
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("cifar.py: error: ")
    assert "dog/1.png is not a readable image" in err.splitlines()[-1]
    assert not Path("runs").exists()


def test_the_script_itself_runs_from_anywhere(tmp_path):
    command = [sys.executable, str(ROOT / "recipes" / "cifar.py"), "fit", "--data", "folder:nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "cifar.py: error: --data folder:nowhere: there is no such folder; pass one that holds train/ and test/"
    ]
