"""Tuning of the plasticity benchmarks' peers, and runs that are taken from earlier results."""

import json
import sys

import pytest
import torch

from recipes.errors import BadInput
from recipes.plasticity import study, tuning
from recipes.plasticity.network import Mlp
from recipes.plasticity.settings import SETTINGS
from recipes.plasticity.streams import Stream
from recipes.plasticity.training import METHODS, OURS, Run, adjusted, equipped, installed, setting_of, train
from recipes.plasticity.tuning import GRIDS, Trial, arguments, table, tune, used, words

SMALL = Stream("labels", tasks=1, samples=64, epochs=2, last=1)


def test_every_peer_has_eight_settings_among_them_the_one_it_runs_at():
    assert set(GRIDS) == set(METHODS) - set(OURS) - {"bare"}
    for method, grid in GRIDS.items():
        assert len(grid) == len({words(options) for options in grid}) == 8, method
        assert sum(used(method, options) for options in grid) == 1, method


@pytest.mark.parametrize("method", [m for m in GRIDS if installed(m)])
def test_options_reach_the_training(method):
    images = (torch.rand(64, 36, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3)
    long = Stream("labels", 2, 64, 20, 1)
    own = train(long, SETTINGS["pixels"], method, 1, images, setting_of(method))
    plain = train(long, SETTINGS["pixels"], method, 1, images)
    assert own.curve == plain.curve
    for options in GRIDS[method]:
        kind, theirs = adjusted(method, options)
        model = Mlp(6, 3)
        optimizer = equipped(method, model, torch.optim.Adam(model.parameters()), 6, 0, torch.Generator(), [], theirs)
        peer = kind(model, optimizer, torch.Generator())
        for name, value in options.items():
            where = {"UPGD": optimizer.param_groups[0], "ccbp-pytorch": vars(optimizer)}.get(method)
            assert (getattr(peer, name.upper()) if where is None else where[name]) == value
    with pytest.raises(BadInput, match=f"{method}: option 'nothing' is unknown; it has "):
        adjusted(method, {"nothing": 1})


def test_the_table_marks_what_is_best_and_what_is_used():
    trials = [
        Trial(setting, "L2-init", 1, score, 1.0, options=words({"strength": strength}))
        for setting, strength, score in (
            ("pixels", 1e-3, 0.4),
            ("standardised", 1e-3, 0.6),
            ("pixels", 1e-2, 0.5),
            ("standardised", 1e-2, 0.3),
            ("pixels", 1e-4, 0.9),
        )
    ]
    lines = table(trials).splitlines()
    assert lines[2:] == [
        "| L2-init | strength 0.0001 | 0.900 |  |  |  |",
        "| L2-init | strength 0.001 | 0.400 | 0.600 | **0.500** | used |",
        "| L2-init | strength 0.01 | 0.500 | 0.300 | 0.400 |  |",
    ]


def test_tuning_runs_nothing_twice_and_makes_one_table_of_commands_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tuning.STREAMS, "labels", SMALL)
    monkeypatch.setattr(tuning, "GRIDS", {m: GRIDS[m][:2] for m in ("L2-init", "UPGD", "ReDo")})
    common = ["--data", "digits", "--tasks", "1", "--settings", "pixels", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        tune(arguments([*common, "--done"]))
    assert "--done: nothing of this is in" in capsys.readouterr().err
    tune(arguments([*common, "--methods", "L2-init"]))
    tune(arguments([*common, "--methods", "UPGD"]))
    assert len(list((tmp_path / "runs").iterdir())) == 4
    monkeypatch.setattr(tuning, "train", None)
    tune(arguments([*common, "--methods", "L2-init", "UPGD"]))
    tune(arguments([*common, "--methods", "L2-init", "UPGD", "ReDo", "--done"]))
    document = json.loads((tmp_path / "tuning.json").read_text())
    assert [r["options"] for r in document["runs"]][:2] == ["strength 1e-05", "strength 0.0001"]
    assert all(r["device"] == document["device"] and r["commit"] for r in document["runs"])
    text = (tmp_path / "tuning.md").read_text()
    assert text.count("| UPGD |") == 2 and "ReDo" not in text and "--methods L2-init UPGD`" in text


def results(folder, **changes):
    """A result file as a study writes it, of two runs."""
    runs = [
        {"setting": "pixels", "method": m, "seed": 1, "score": s, "seconds": 1.0, "curve": [s], "commit": "abc"}
        for m, s in (("bare", 0.25), ("ReDo", 0.75))
    ]
    stream = {"kind": "labels", "tasks": 1, "samples": 64, "epochs": 2, "last": 1}
    document = {"command": "python", "data": "digits", "stream": stream, "device": "a clock", "runs": runs, **changes}
    (folder / "labels.json").write_text(json.dumps(document))


def test_runs_of_an_earlier_table_are_taken_and_only_others_made(tmp_path, monkeypatch):
    monkeypatch.setitem(study.STREAMS, "labels", SMALL)
    out = tmp_path / "out"
    results(tmp_path)
    command = ["labels.py", "--data", "digits", "--seeds", "1", "--settings", "pixels", "--out", str(out)]
    command += ["--from-results", str(tmp_path)]
    made = []
    monkeypatch.setattr(
        study,
        "train",
        lambda stream, setting, method, *_: made.append(method) or Run("pixels", method, 1, 0.5, 1.0, [0.5]),
    )
    monkeypatch.setattr(sys, "argv", [*command, "--methods", "bare", "ReDo", "UPGD"])
    study.main("labels", "Labels.", ("pixels",), "accuracy")
    assert made == ["UPGD"]
    document = json.loads((out / "labels.json").read_text())
    assert [(r["method"], r["score"]) for r in document["runs"]] == [("bare", 0.25), ("ReDo", 0.75), ("UPGD", 0.5)]
    assert [r["device"] for r in document["runs"]] == ["a clock", "a clock", document["device"]]
    text = (out / "labels.md").read_text()
    assert f"Runs on a clock: bare, ReDo; on {document['device']}: UPGD." in text
    assert f"Runs of commit abc: bare, ReDo; of {document['commit']}: UPGD." in text
    for values in document["runs"]:  # a run that is there stays as it is
        values["score"] = 0.0
    (tmp_path / "labels.json").write_text(json.dumps(document))
    study.main("labels", "Labels.", ("pixels",), "accuracy")
    assert made == ["UPGD"] and (out / "labels.md").read_text() == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "cifar10"}, "labels.json has data 'cifar10', this is 'digits'"),
        ({"stream": {"tasks": 6}}, "labels.json has tasks 6, this is 1; give the same"),
        ({"command": "python x.py --weights y.pt"}, "--weights None: labels.json has runs of `python x.py"),
    ],
)
def test_runs_of_another_table_are_refused(changes, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(study.STREAMS, "labels", SMALL)
    results(tmp_path, **changes)
    command = ["labels.py", "--data", "digits", "--out", str(tmp_path / "out"), "--from-results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        study.main("labels", "Labels.", ("pixels",), "accuracy")
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_results_that_are_not_there_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["labels.py", "--data", "digits", "--from-results", str(tmp_path)])
    with pytest.raises(SystemExit):
        study.main("labels", "Labels.", ("pixels",), "accuracy")
    assert "no labels.json is there; leave the option out" in capsys.readouterr().err
