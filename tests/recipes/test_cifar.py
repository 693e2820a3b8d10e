"""The command as its users give it: every configuration, the run's files, a resumed run, and bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from recipes import record
from recipes.cifar import long_form
from recipes.images import saving
from recipes.images.cli import CONFIGS, spelled_out
from recipes.images.task import ImageTask

ROOT = Path(__file__).resolve().parents[2]
QUICK = (
    *("--model.depth", "8", "--trainer.log_every_n_steps", "1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
)


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
        ("fit --data digits --config mine.yaml", "fit --config mine.yaml --data.name digits"),
        ("fit --config", "fit --config"),
        ("fit --help", "fit --help"),
        ("--help", "--help"),
        ("", ""),
    ],
)
def test_the_data_set_is_named_and_chooses_the_configuration(given, spelled):
    expected = spelled.replace("C/", f"{CONFIGS}/").split()
    assert spelled_out(given.split()) == expected
    assert spelled_out(expected) == expected


def test_short_forms_are_spelled_out():
    given = "fit -c a.yaml --epochs 3 --vanilla --precision=bf16-mixed --schedule 1/16"
    spelled = "--trainer.max_epochs 3 --model.learn_tau false --trainer.precision=bf16-mixed --schedule 1/16"
    assert long_form(given.split()) == f"fit -c a.yaml {spelled}".split()
    assert long_form(long_form(given.split())) == long_form(given.split())


@pytest.mark.parametrize(
    ("args", "epochs"), [(["1/10"], 4), (["0.1"], 4), (["1/1000"], 1), (["1"], 40), (["1/2", "--epochs", "5"], 3)]
)
def test_a_schedule_is_a_share_of_the_epochs_and_the_run_keeps_their_number(cifar, args, epochs):
    cli = cifar("fit", "--schedule", *args, "--trainer.limit_train_batches", 0, *QUICK)
    assert cli.trainer.max_epochs == epochs
    kept = yaml.safe_load((Path(cli.trainer.log_dir) / "config.yaml").read_text())
    assert (kept["trainer"]["max_epochs"], kept["schedule"]) == (epochs, None)


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


def test_last_is_of_the_last_epoch_and_best_of_the_best_one(cifar, monkeypatch):
    monkeypatch.setattr(
        ImageTask, "validation_step", lambda task, *batch: task.log("val_error", 10.0 + task.current_epoch)
    )
    cli = cifar("fit", "--epochs", 3, "--trainer.limit_train_batches", 2, *QUICK)
    folder = Path(cli.trainer.log_dir) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt"]
    last, best = (torch.load(folder / f"{name}.ckpt", weights_only=True) for name in ("last", "best"))
    assert (last["epoch"], last["global_step"], best["epoch"]) == (2, 6, 0)
    assert all(torch.equal(value, last["state_dict"][name]) for name, value in cli.model.state_dict().items())


def test_one_seed_gives_one_result_and_the_vanilla_twin_is_one_option(cifar, image_folder):
    def losses(*args):
        data = ("--data", f"folder:{image_folder}", "--data.label", "small")
        cli = cifar("fit", *data, "--trainer.max_epochs", 2, *QUICK, *args)
        assert Path(cli.trainer.log_dir).parts[:2] == ("runs", "small")
        return cli.trainer.callback_metrics["train_loss"], cli.model.net

    first, again, other = losses(), losses(), losses("--seed_everything", 1)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    _, vanilla = losses("--vanilla")
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
        (["fit", "--precision", "16-mixed", "--trainer.accelerator", "cpu"], ["16-mixed needs a GPU", "bf16-mixed"]),
        (["test", "--precision", "16-mixed", "--trainer.accelerator", "cpu"], ["16-mixed needs a GPU", "bf16-mixed"]),
        (["fit", "--precision", "8"], ["trainer.precision", "8"]),
        (["fit", "--precision", "transformer-engine"], ["transformer_engine"]),
        (["fit", "--schedule", "1/0"], ["--schedule", "1/0", "1/16"]),
        (["fit", "--schedule", "2"], ["--schedule", "2 is no share"]),
        (["fit", "--schedule", "1/2", "--epochs", "-1"], ["--schedule", "max_epochs, which is -1"]),
        (["fit", "--model.ema", "1"], ["--model.ema 1", "null for none"]),
        (["fit", "--model.mixup", "-1"], ["--model.mixup -1"]),
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
    elsewhere = shutil.copy(good, tmp_path / "elsewhere.ckpt")  # no configuration beside it
    for subcommand, path in (("fit", elsewhere), ("validate", good), ("test", good)):
        args = [subcommand, "--ckpt_path", path, "--model.depth", 14]
        _fails(cifar, capfd, args, str(path), "depth 8", "depth 14")
    (tmp_path / "elsewhere.ckpt").unlink()
    assert _written(tmp_path) == before


def test_another_number_of_processes_is_refused(cifar, capfd, tmp_path):
    cifar("fit", "--data", "digits", "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 2, *QUICK)
    checkpoint = tmp_path / "runs" / "digits" / "version_0" / "checkpoints" / "last.ckpt"
    before = _written(tmp_path)
    capfd.readouterr()
    two = ["--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.strategy", "ddp"]
    _fails(cifar, capfd, ["fit", "--ckpt_path", checkpoint, *QUICK, *two], "1 process", "--trainer.devices 1")
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


def test_an_unknown_key_in_a_configuration_is_named(cifar, capfd, tmp_path):
    config = yaml.safe_load((CONFIGS / "digits.yaml").read_text())
    for group, key in (("model", "deepness"), ("data", "batchsize"), ("trainer", "epochs")):
        path = tmp_path / f"{group}.yaml"
        path.write_text(yaml.safe_dump({**config, group: {**config[group], key: 3}}))
        _fails(cifar, capfd, ["fit", "--config", path], key)
    assert _written(tmp_path) == sorted(tmp_path.glob("*.yaml"))


def test_classes_that_differ_between_the_splits_are_named(cifar, capfd, image_folder):
    shutil.rmtree(image_folder / "test" / "owl")
    _fails(cifar, capfd, ["fit", "--data", f"folder:{image_folder}", *QUICK], "same classes", "owl only in train/")
    assert not Path("runs").exists()


def test_a_run_is_resumed_under_its_own_configuration_alone(cifar, capfd, tmp_path):
    short = ["--trainer.limit_train_batches", 1, *QUICK]
    cifar("fit", "--epochs", 1, *short)
    folder = tmp_path / "runs" / "digits" / "version_0"
    resume = ["--ckpt_path", folder / "checkpoints" / "last.ckpt", "--epochs", 2, *short]
    before, _ = _written(tmp_path), capfd.readouterr()
    for other, name in (
        (["--model.lr", 0.2], "model.lr 0.1 there and 0.2 here"),
        (["--model.label_smoothing", 0.1], "model.label_smoothing 0.0 there and 0.1 here"),
        (["--data.batch_size", 64], "data.batch_size 128 there and 64 here"),
        (["--seed_everything", 1], "seed_everything 0 there and 1 here"),
    ):
        _fails(
            cifar, capfd, ["fit", *resume, *other], "of another configuration", name, f"--config {folder}/config.yaml"
        )
    _fails(cifar, capfd, ["fit", *resume, "--vanilla", "--model.lr", 1], "model.learn_tau", "model.lr")
    assert _written(tmp_path) == before
    # The trainer's options, and what changes nothing that is computed, may change.
    cli = cifar("fit", *resume, "--data.workers", 0, "--data.eval_batch_size", 250)
    assert cli.trainer.current_epoch == 2
    # An option that the run's version did not know had its default; other subcommands take any data.
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    del kept["model"]["mixup"]
    (folder / "config.yaml").write_text(yaml.safe_dump(kept))
    cifar("fit", *resume)
    cifar("test", "--ckpt_path", folder / "checkpoints" / "last.ckpt", "--data.val_fraction", 0.1, *QUICK)
    capfd.readouterr()
    (folder / "config.yaml").write_text("[")
    _fails(cifar, capfd, ["fit", *resume], "config.yaml", "not the configuration of a run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("what", ["checkpoint", "log", "run.json"])
def test_a_full_disk_is_one_line_and_earlier_files_are_intact(cifar, capfd, tmp_path, monkeypatch, what):
    args = ["fit", "--trainer.limit_train_batches", 1, *QUICK]
    cifar(*args, "--epochs", 1)
    folder = tmp_path / "runs" / "digits" / "version_0"
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capfd.readouterr()
    real, partial = Path.open, {"checkpoint": ".ckpt.partial", "run.json": "run.json.partial"}.get(what)

    def full(path, *more, **options):
        if partial and path.name.endswith(partial):
            path.touch()  # the name is taken, and then there is no room
            return real(Path("/dev/full"), *more, **options)
        return real(path, *more, **options)

    def no_log(writer):
        with open("/dev/full", "w") as file:
            file.write("a line")

    for module in (saving, record):
        monkeypatch.setattr(module.os, "fsync", lambda number: None)  # a device has nothing to keep
    monkeypatch.setattr(Path, "open", full)
    if what == "log":
        monkeypatch.setattr(ExperimentWriter, "save", no_log)
    resumed = ["--ckpt_path", folder / "checkpoints" / "last.ckpt"]
    with pytest.raises(SystemExit) as ended:
        cifar(*args, "--epochs", 2, *resumed)
    assert ended.value.code == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("cifar.py: error: no room on the disk (No space left on device)")
    assert {path: path.read_bytes() for path in files} == files
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_a_checkpoint_for_which_there_is_no_room_leaves_the_old_one(tmp_path):
    """Not a stand-in for a full disk: the system itself refuses the bytes, in the middle of the file."""
    code = """
import resource, signal, torch
from recipes.images.saving import WholeFiles, out_of_room
io, path = WholeFiles(), "last.ckpt"
io.save_checkpoint({"x": torch.arange(1000)}, path)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    io.save_checkpoint({"x": torch.zeros(10**6)}, path)
except Exception as error:
    print(out_of_room(error).strerror)
print(torch.equal(io.load_checkpoint(path, weights_only=True)["x"], torch.arange(1000)))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["File too large", "True"], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_an_interrupted_download_is_one_line_and_leaves_nothing(cifar, capfd, cifar10_online, web, tmp_path):
    archive = web[0] / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-100])  # the server hangs up early
    with pytest.raises(SystemExit) as ended:
        cifar("fit", "--data", "cifar10", "--trainer.fast_dev_run", "true", *QUICK)
    assert ended.value.code == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("cifar.py: error: --data cifar10: ")
    assert "deleted what was damaged: data/cifar-10-python.tar.gz" in last
    assert not any(path.is_file() for path in (tmp_path / "data").rglob("*"))
