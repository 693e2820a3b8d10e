"""The demo: tables, pictures and data, and that what it promises happens: a twin stops, blocks change places."""

import json
import sys

import pytest
import torch

from recipes import demo
from recipes.demonstration import changing_places, learning_on, pictures
from recipes.images.sources import Digits


def _run(monkeypatch, folder, *args):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["demo.py", *args])
    demo.main()


def _rows(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_the_demo_prints_its_tables_and_writes_pictures_and_data(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(changing_places, "DEPTH", 14)
    _run(monkeypatch, tmp_path, "--epochs", "1", "--tasks", "2", "--out", "out")
    out = capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["demo.json", "demo.png", "table.md", "tau.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # and nothing elsewhere
    text = (tmp_path / "out" / "table.md").read_text()
    assert text in out + "\n"
    twins, places = map(_rows, text.strip().split("\n\n"))
    result = json.loads((tmp_path / "out" / "demo.json").read_text())
    for row, twin in zip(twins[2:], result["twins"], strict=True):
        assert row[0] == twin["name"] and row[-1] == str(twin["births"])
        assert row[1:3] == [f"{accuracy:.2f}" for accuracy in twin["curve"]]
    assert places[0][1:] == ["test error", "steps", "re-sorts"]  # no seconds: a run like another prints the same
    for row, run in zip(places[2:], result["runs"], strict=True):
        assert row == [run["configuration"], f"{run['test_error_percent']:.1f} %", "11", str(run["resorts"])]
    assert [run["configuration"] for run in result["runs"]] == list(changing_places.CONFIGURATIONS)
    assert {"device", "versions", "commit", "seed", "epochs", "depth", "tasks"} <= set(result)
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in ("demo.png", "tau.png"))


def test_one_twin_loses_units_that_the_other_gets_back_and_a_run_is_like_another(monkeypatch):
    monkeypatch.setattr(learning_on, "LR", 1e-2)  # so that the units of the bare twin die within two tasks
    images = Digits().decode("train")
    bare, wrapped = (learning_on.learn(name, images, tasks=2, seed=0) for name in learning_on.TWINS)
    assert bare.births == 0 < wrapped.births
    assert bare.silent > 0.4 > 0.2 > wrapped.silent
    again = learning_on.learn('Adam, scheme="plastic"', images, tasks=2, seed=0)
    assert (again.curve, again.silent, again.births) == (wrapped.curve, wrapped.silent, wrapped.births)


def test_a_unit_is_silent_if_no_image_reaches_it():
    model = learning_on.network()
    with torch.no_grad():
        model[0].bias[:16] = -100
        model[2].bias[:32] = -100
    assert learning_on.silent_share(model, torch.rand(100, 64)) >= 48 / 128


def test_the_quarters_of_the_table_are_means_over_tasks():
    curve = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    row = _rows(pictures.learning_table([learning_on.Learner("a", curve, 0.25, 3, 0.0)]))[2]
    assert row == ["a", "0.15", "0.35", "0.55", "0.75", "25 %", "3"]


def test_the_configuration_of_the_picture_re_sorts():
    outcome = changing_places.train(changing_places.DRAWN, epochs=4, seed=0)
    assert outcome.resorts > 0
    assert outcome.resorts == sum(len(t.resorts) for t in outcome.monitor.trajectories.values())
    assert all(len(t.steps) == outcome.steps + 1 == 45 for t in outcome.monitor.trajectories.values())


@pytest.mark.parametrize("args", [("--epochs", "0"), ("--tasks", "0"), ("--out", "file/inside")])
def test_bad_arguments_end_with_one_line(monkeypatch, tmp_path, capsys, args):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        _run(monkeypatch, tmp_path, *args)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("demo.py: error: ")
