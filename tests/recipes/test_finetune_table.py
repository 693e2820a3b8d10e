"""The comparison as a command: what it writes, that finished runs are kept, and what it says about them."""

import json
import sys

import pytest

from recipes.finetune import table as finetune_table
from recipes.finetune.table import main, table

TINY = '{"patch_size": 1, "depths": [1, 1, 3, 1], "dims": [8, 8, 16, 16], "ls_init_value": 1.0}'
ARGS = (
    *("--data", "digits", "--seeds", "1", "--pretrain-epochs", "1", "--epochs", "2", "--tau-lr", "30", "--out", "out"),
    *("--", "--model.kwargs", TINY, "--trainer.log_every_n_steps", "1"),
)


@pytest.fixture
def compare(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["recipes/finetune/table.py", *args])
        main()

    return run


def test_it_runs_once_and_keeps_what_has_finished(compare, capfd, tmp_path, monkeypatch):
    compare(*ARGS)
    document = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert document["data"] == "digits"
    assert {"device", "commit", "processor_seconds"} <= set(document) and "timm" in document["versions"]
    assert document["pretraining"]["data"] == "digits-classes-0-1-2-3-4"
    plain, mean_field = (document["runs"][m]["0"] for m in ("plain", "mean-field, tau lr x30"))
    assert plain["data"] == mean_field["data"] == "digits-classes-5-6-7-8-9"
    # The same weights and batches: while only the classifier learns, the twins are one.
    assert plain["epochs"][0] == mean_field["epochs"][0]
    assert "classifier of 5 classes left out" in plain["weights"]
    assert (plain["steps"], plain["plain_checkpoint"]["folded"]) == ({}, False)
    assert mean_field["plain_checkpoint"]["folded"]
    text = (tmp_path / "out" / "finetune.md").read_text()
    for run in (plain, mean_field):
        assert f"| {run['epochs'][-1]['val_error']:.2f} |" in text
    assert (tmp_path / "out" / "finetune.png").stat().st_size > 1000

    monkeypatch.setattr(finetune_table, "run", lambda *args: pytest.fail("a finished run was done again"))
    compare(*ARGS)
    assert json.loads((tmp_path / "out" / "finetune.json").read_text())["runs"] == document["runs"]
    capfd.readouterr()
    other = [a.replace("{", '{"drop_path_rate": 0.1, ') for a in ARGS]
    with pytest.raises(SystemExit) as ended:
        compare(*other)
    assert ended.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("finetune/table.py: error: ") and "is of another run" in line


def _record(error, resorts=0):
    return {
        "epochs": [{"val_error": 90.0}, {"val_error": error}],
        "model": {"name": "net", "kwargs": None},
        "resorts": resorts,
        "steps": {"stage": [0.9, 1.2]},
        "plain_checkpoint": {"error": 1e-7},
    }


@pytest.mark.parametrize(
    ("errors", "interval", "verdict"),
    [
        # differences -1, -2, -3: mean -2, deviation 1, so 4.30 / sqrt(3) = 2.48
        ((29.0, 28.0, 27.0), "-2.00 ± 2.48", "not distinguishable from plain"),
        ((28.0, 28.1, 27.9), "-2.00 ± 0.25", "better than plain"),
        ((32.0, 32.1, 31.9), "+2.00 ± 0.25", "worse than plain"),
    ],
)
def test_the_table_tells_a_difference_only_where_the_seeds_do(errors, interval, verdict):
    runs = {
        "plain": {s: _record(30.0) for s in range(3)},
        "mean-field": {s: _record(e, resorts=s) for s, e in enumerate(errors)},
    }
    text = table("some images", _record(20.0), runs)
    assert f"| {interval} | 0, 1, 2 | 0.90 to 1.20 |" in text
    assert f"- mean-field: {verdict} over 3 seeds; blocks changed places 3 times in 3 runs." in text
