"""Curves read back from Lightning's CSV, and what a result says about its making."""

import subprocess
from pathlib import Path

import torch

from recipes import record
from recipes.errors import BadInput, one_line


def test_the_rows_of_one_epoch_are_joined(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(
        "epoch,lr-SGD,step,tau/a/0,train_error,train_loss,val_error,val_loss\n"
        ",,0,1.0,,,,\n"
        "0,,10,,,,80.5,2.5\n"
        "0,,10,,90.0,2.25,,\n"
        ",0.1,20,,,,,\n"
        "1,,21,,,,70.0,2.0\n"
        "1,,21,,75.0,1.75,,\n"
    )
    assert record.read_epochs(path) == [
        {"epoch": 0, "val_error": 80.5, "val_loss": 2.5, "train_error": 90.0, "train_loss": 2.25},
        {"epoch": 1, "val_error": 70.0, "val_loss": 2.0, "train_error": 75.0, "train_loss": 1.75},
    ]


def test_a_result_names_device_versions_and_commit(monkeypatch, tmp_path):
    made_by = record.provenance(torch.device("cpu"))
    assert made_by["device"]
    assert set(made_by["versions"]) == {"torch-meanfield", "torch", "torchvision", "lightning"}
    assert None not in made_by["versions"].values()
    assert made_by["threads"] == torch.get_num_threads()

    def git(*args):
        subprocess.run(["git", "-C", str(tmp_path), *args], check=True, capture_output=True)

    monkeypatch.setattr(record, "__file__", str(tmp_path / "recipes" / "record.py"))
    (tmp_path / "recipes").mkdir()
    assert record._commit() is None  # no checkout
    git("init")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-m", "m")
    clean = record._commit()
    assert len(clean) == 12
    (tmp_path / "file").write_text("b")
    assert record._commit() == clean + "+"


def test_the_message_of_a_worker_is_its_last_line():
    text = "Caught BadInput in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
    assert one_line(BadInput(text + "recipes.errors.BadInput: a.png is: broken\n")) == "a.png is: broken"
    assert one_line(BadInput("two\n  lines")) == "two lines"
    assert Path(record.__file__).exists()
