"""The table: its rows are the configurations, its words follow the data, and a killed grid gives the same one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from recipes.grids import table
from recipes.grids.rows import ROWS, Row, rows
from recipes.grids.table import TWINS, asked, rendered, run_name, write
from recipes.images.cli import CONFIGS

ROOT = Path(__file__).resolve().parents[2]


def asked_for(*args):
    return asked([str(a) for a in args])[0]


def made_up(rows=("resnet20",), seeds=2, epochs=2):
    """Records as runs write them: seed 0 differs by -1 point, seed 1 by -3."""
    records = {}
    for row in rows:
        for seed in range(seeds):
            for twin, last in (("vanilla", 10.0), ("mean-field", 9.0 - 2 * seed)):
                records[run_name(row, twin, seed)] = {
                    "epochs": [{"epoch": e, "val_error": last + epochs - 1 - e} for e in range(epochs)],
                    "resorts": 3 * seed,
                    "seconds": 60.0,
                    "device": "a machine",
                    "threads": 1,
                    "commit": "0123456789ab",
                    "trainer": {"precision": None},
                    "versions": {"torch": "2", "lightning": "2"},
                }
    return records


PUBLISHED = {
    "resnet20": (8.75, 8.19),
    "resnet32": (7.51, 7.15),
    "resnet44": (7.17, 6.91),
    "resnet56": (6.97, 6.72),
    "resnet110": (6.37, 6.10),
    "resnet164": (5.46, 5.19),
    "resnext29-8x64d": (17.92, 17.53),
    "resnext29-16x64d": (17.65, 16.81),
}


def test_the_rows_and_their_figures_are_those_published():
    """Lu et al. 2020, Table 1."""
    assert {name: row.published for name, row in ROWS.items()} == PUBLISHED


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_its_configuration(name):
    """That the configuration is the published protocol is shown in test_configs.py."""
    row = ROWS[name]
    config = yaml.safe_load((CONFIGS / row.config).read_text())
    trainer = yaml.safe_load((CONFIGS / config["trainer"]).read_text())
    assert (trainer["max_epochs"], config["data"]["name"]) == (row.epochs, row.data)
    assert row.config.startswith(name + "-") and row.title.startswith(("ResNet-", "ResNeXt-"))


def test_published_figures_stand_beside_their_own_data_set_only():
    records = made_up()
    own = asked_for("--rows", "resnet20", "--seeds", 2)
    text = rendered(own, records, "c")
    assert "| published: vanilla | mean-field | difference |" in text
    assert "| 8.75 | 8.19 | -0.56 |" in text
    short = rendered(asked_for("--epochs", 2, "--seeds", 2), records, "c")
    assert "| published, full schedule: vanilla |" in short
    assert "these runs are shorter" in short
    for other in (("--data", "digits"), ("--data", "cifar100"), ("--label", "cifar10-jpeg")):
        text = rendered(asked_for("--seeds", 2, *other), records, "c")
        assert "8.75" not in text
        assert "are left out" in text
        forced = rendered(asked_for("--seeds", 2, "--published", *other), records, "c")
        assert "published, on CIFAR: another data set" in forced
        assert "do not compare them" in forced


def test_the_row_is_mean_spread_paired_difference_and_resorts():
    text = rendered(asked_for("--data", "digits", "--seeds", 2), made_up(), "python it")
    # Differences -1 and -3: mean -2, t(1) = 12.706, standard deviation sqrt(2).
    assert "| ResNet-20 | digits | 160 | 2 of 2 | 10.00 ± 0.00 | 8.00 ± 1.41 | -2.00 ± 12.71 | 0, 3 |" in text
    assert "Made by `python it`: 4 of 4 runs" in text
    partial = made_up()
    del partial["resnet20-mean-field-1"]
    some = asked_for("--data", "digits", "--seeds", 2)
    assert "| 1 of 2 | 10.00 ± 0.00 | 9.00 | -1.00 | 0 |" in rendered(some, partial, "c")
    assert "| 0 of 2 | – | – | – | – |" in rendered(some, {}, "c")


def test_table_json_and_picture_hold_the_same(tmp_path):
    rows = ("resnet20", "resnet56")
    of = asked_for("--rows", ",".join(rows), "--seeds", 2, "--data", "digits")
    write(of, {}, tmp_path, "c")
    assert not (tmp_path / "table.png").exists()
    write(of, made_up(rows), tmp_path, "c")
    row = json.loads((tmp_path / "table.json").read_text())["rows"]["resnet56"]
    assert row["difference"] == -2.0
    assert row["errors"] == {"vanilla": {"0": 10.0, "1": 10.0}, "mean-field": {"0": 9.0, "1": 7.0}}
    assert row["published"] is None
    assert (tmp_path / "table.png").read_bytes()[:4] == b"\x89PNG"


def test_the_schedule_is_a_share_of_the_published_epochs():
    short = asked_for("--rows", "all", "--schedule", "1/16")
    assert short.epochs_of("resnet20") == 10
    assert short.epochs_of("resnext29-8x64d") == 19
    assert len(short.jobs()) == len(ROWS) * len(TWINS) * 3
    assert "--trainer.max_epochs 10 --trainer.devices 1" in " ".join(short.jobs()[0].args)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--rows", "resnet21"], ["--rows resnet21", "resnet20"]),
        (["--epochs", "0"], ["--epochs 0"]),
        (["--seeds", "-1"], ["--seeds -1"]),
        (["--data", "folder:nowhere"], ["folder:nowhere"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(monkeypatch, capsys, tmp_path, args, parts):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["table.py", *args])
    with pytest.raises(SystemExit) as ended:
        table.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert len(error.splitlines()) == 1
    assert all(part in error for part in parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", ["0", "2", "1/0", "half"])
def test_an_impossible_share_is_refused(capsys, share):
    with pytest.raises(SystemExit) as ended:
        asked(["--schedule", share])
    assert ended.value.code == 2
    assert "1/16 or 0.0625" in capsys.readouterr().err


def test_killed_in_the_middle_and_started_again_the_table_is_the_same(tmp_path):
    """Real trainings on digits: SIGKILL to the script and its trainings after an epoch, then the same command."""

    def command(out):
        args = ["--rows", "resnet20", "--seeds", "1", "--data", "digits", "--epochs", "4", "--jobs", "1", "--out", out]
        more = ["--model.depth", "14", "--trainer.limit_train_batches", "4"]
        return [sys.executable, str(ROOT / "recipes" / "table.py"), *args, "--", *more]

    def rows(out):
        runs = {path.name: json.loads(path.read_text()) for path in sorted((out / "runs").glob("*.json"))}
        lines = [line for line in (out / "table.md").read_text().splitlines() if line.startswith("|")]
        return {name: (run["epochs"], run["steps"]) for name, run in runs.items()}, lines

    env = dict(os.environ, OMP_NUM_THREADS="1")
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    subprocess.run(command(str(whole)), env=env, check=True, capture_output=True)
    begun = subprocess.Popen(
        command(str(pieces)), env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    first = pieces / "runs" / "resnet20-vanilla-0"
    deadline = time.monotonic() + 120
    while not list(first.glob("*/version_0/curve.json")):
        assert time.monotonic() < deadline
        assert begun.poll() is None
        time.sleep(0.01)
    os.killpg(begun.pid, signal.SIGKILL)
    begun.wait()
    assert not (pieces / "runs" / "resnet20-vanilla-0.json").exists()
    done = subprocess.run(command(str(pieces)), env=env, check=True, capture_output=True, text=True)
    assert rows(pieces) == rows(whole)
    assert len(list(first.glob("*/version_*"))) == 2  # it went on; it did not begin anew
    assert re.search(r"\| ResNet-20 \| digits \| 4 \| 1 of 1 \|", done.stdout)


def test_a_row_is_added_by_one_configuration(tmp_path):
    """A copy of the configurations and one more file are one more row, in its place among the sizes."""
    for path in CONFIGS.glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "trainer").mkdir()
    for path in (CONFIGS / "trainer").glob("*.yaml"):
        (tmp_path / "trainer" / path.name).write_text(path.read_text())
    assert rows(tmp_path) == ROWS
    added = {"trainer": "trainer/300-epochs.yaml", "data": {"name": "cifar10"}, "model": {"depth": 50}}
    added |= {"table": {"title": "ResNet-50", "published": [9.0, 8.0]}}
    path = tmp_path / "resnet50-cifar10.yaml"
    path.write_text(yaml.safe_dump(added))
    assert rows(tmp_path)["resnet50"] == Row("ResNet-50", path.name, "cifar10", 300, (9.0, 8.0))
    assert list(rows(tmp_path)) == [*list(ROWS)[:3], "resnet50", *list(ROWS)[3:]]
    path.write_text(yaml.safe_dump({**added, "table": {"title": "ResNet-50"}}))
    with pytest.raises(ValueError, match=r"resnet50-cifar10.yaml: table needs a title and published"):
        rows(tmp_path)
