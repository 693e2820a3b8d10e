"""The curve of a run: whole after an interruption, and never half-written."""

import json
import sys
from pathlib import Path

import pytest

from recipes.cifar import main
from recipes.images.task import ImageTask
from recipes.record import write_json

QUICK = (
    *("fit", "--data", "digits", "--model.depth", "8", "--trainer.log_every_n_steps", "1"),
    *("--trainer.max_epochs", "3", "--trainer.limit_train_batches", "2"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
)


@pytest.fixture
def fit(monkeypatch, tmp_path):
    """Train on digits in an empty folder; the run's record."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["cifar.py", *QUICK, *map(str, args)])
        cli = main()
        return json.loads((Path(cli.trainer.log_dir) / "run.json").read_text())

    return run


def test_an_interrupted_run_has_the_curve_of_an_uninterrupted_one(fit, monkeypatch):
    whole = fit("--trainer.default_root_dir", "whole")
    assert [epoch["epoch"] for epoch in whole["epochs"]] == [0, 1, 2]
    assert set(whole["epochs"][0]) == {"epoch", "train_loss", "train_error", "val_loss", "val_error"}

    def fall(task):
        if task.current_epoch == 2:
            raise RuntimeError("power cut")

    with monkeypatch.context() as cut:
        cut.setattr(ImageTask, "on_train_epoch_start", fall, raising=False)
        with pytest.raises(RuntimeError, match="power cut"):
            fit("--trainer.default_root_dir", "pieces")
    first = Path("pieces/digits/version_0")
    assert json.loads((first / "curve.json").read_text())["epochs"] == whole["epochs"][:2]
    assert not (first / "run.json").exists()
    again = fit("--trainer.default_root_dir", "pieces", "--ckpt_path", first / "checkpoints" / "last.ckpt")
    assert again["epochs"] == whole["epochs"]
    assert again["steps"] == whole["steps"]


def test_what_a_run_records_is_the_networks_own(fit):
    run = fit("--model.horizon", "1", "--trainer.precision", "bf16-mixed")
    assert run["trainer"]["max_epochs"] == 3
    assert run["trainer"]["precision"] == "bf16-mixed"
    assert all(len(steps) == 1 for steps in run["steps"].values())
    assert fit("--model.learn_tau", "false")["steps"] == {}


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json(path, {"x": 1})
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert json.loads(path.read_text()) == {"x": 1}
    assert list(path.parent.iterdir()) == [path]
