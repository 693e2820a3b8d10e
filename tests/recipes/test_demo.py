"""The demo: its table, picture and data, and that what it promises happens: re-sorts, from the twins' common start."""

import json
import sys

import pytest

from recipes import demo


def _run(monkeypatch, folder, *args):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["demo.py", *args])
    demo.main()


def test_the_demo_prints_its_table_and_writes_picture_and_data(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "DEPTH", 14)
    _run(monkeypatch, tmp_path, "--epochs", "1", "--out", "out")
    out = capsys.readouterr().out
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["demo.json", "table.md", "tau.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # and nothing elsewhere
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert rows[0] == ["configuration", "test error", "steps", "re-sorts", "seconds"]
    result = json.loads((tmp_path / "out" / "demo.json").read_text())
    for row, run in zip(rows[2:], result["runs"], strict=True):
        expected = [run["configuration"], f"{run['test_error_percent']:.1f} %", "11", str(run["resorts"])]
        assert row[:4] == expected
    assert [run["configuration"] for run in result["runs"]] == list(demo.CONFIGURATIONS)
    assert {"device", "versions", "commit", "seed", "epochs", "depth"} <= set(result)
    assert (tmp_path / "out" / "tau.png").read_bytes().startswith(b"\x89PNG")


def test_the_configuration_of_the_picture_re_sorts():
    outcome = demo.train(demo.DRAWN, epochs=6, seed=0)
    assert outcome.resorts > 0
    assert outcome.resorts == sum(len(t.resorts) for t in outcome.monitor.trajectories.values())
    assert all(len(t.steps) == outcome.steps + 1 == 67 for t in outcome.monitor.trajectories.values())


@pytest.mark.parametrize("args", [("--epochs", "0"), ("--out", "file/inside")])
def test_bad_arguments_end_with_one_line(monkeypatch, tmp_path, capsys, args):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        _run(monkeypatch, tmp_path, *args)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("demo.py: error: ")
