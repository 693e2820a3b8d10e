"""What a result says about its making."""

import doctest
import json
import math
import subprocess

import torch

from recipes import record
from recipes.errors import BadInput, one_line


def test_a_result_names_device_versions_and_commit(monkeypatch, tmp_path):
    made_by = record.provenance(torch.device("cpu"))
    assert made_by["device"]
    assert set(made_by["versions"]) == {"torch-meanfield", "torch", "torchvision", "timm", "lightning"}
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


def test_a_result_file_has_a_line_for_each_run_and_is_what_json_reads(tmp_path):
    curve = [[step, 1 / (step + 3)] for step in range(200)]
    runs = [{"seed": seed, "note": "é", "curve": curve, "nothing": None} for seed in range(3)]
    document = {"command": "x" * 100, "settings": {"a": {1: 2.0}, "b": "y" * 100}, "runs": runs, "bad": float("nan")}
    path = tmp_path / "folder" / "result.json"
    record.write_json(path, document)
    read = json.loads(path.read_text())
    assert math.isnan(read.pop("bad"))
    assert read == json.loads(json.dumps({k: v for k, v in document.items() if k != "bad"}))
    lines = path.read_text().splitlines()
    assert sum("curve" in line for line in lines) == 3 and len(lines) < 20
    record.write_json(path, document, 3)
    assert json.loads(path.read_text())["runs"][0]["curve"][1] == [1, 0.25]
    assert json.loads(path.read_text())["runs"][0]["curve"][0] == [0, 0.333]


def test_the_examples_of_its_docstrings():
    assert doctest.testmod(record).failed == 0 and doctest.testmod(record).attempted >= 2
