"""The study of tau: its settings are the recipe's options, and its page says what the runs say."""

import json
import sys

import pytest

from recipes.cifar import main as cifar
from recipes.grids import grid, tau_study
from recipes.grids.tau_study import (
    SCALES,
    VANILLA,
    Setting,
    asked,
    findings,
    jobs,
    last_error,
    matched,
    outcome,
    rendered,
    settings,
)


def record(error, resorts=0, steps=((1.0, 1.0),)):
    return {
        "epochs": [{"epoch": 0, "val_error": error}],
        "resorts": resorts,
        "steps": {f"stage{i}": list(s) for i, s in enumerate(steps)},
        "seconds": 36.0,
        "trainer": {"precision": None},
        "device": "a machine",
        "threads": 1,
        "versions": {"torch": "2"},
        "commit": "0123456789ab",
    }


def made_up(depth=32, seeds=2):
    """Every setting equals its twin, but horizon n from a uniform start, which is one point better per factor of 10."""
    records = {f"{VANILLA}-{seed}": record(50.0 + seed, resorts=None) for seed in range(seeds)}
    for setting in settings(depth):
        better = SCALES.index(setting.scale) if (setting.horizon, setting.start) == (None, "uniform") else 0
        for seed in range(seeds):
            # Seed 1 is better by a tenth of a point less: an interval that is not empty.
            records[f"{setting.name}-{seed}"] = record(
                50.0 + seed - better * (1 - 0.1 * seed), 4 * better, ((0.5, 1.5),)
            )
    return records


def test_the_settings_are_all_combinations_and_their_names_differ():
    every = settings(32)
    assert len(every) == 3 * 2 * 4
    assert {s.horizon for s in every} == {1.0, 2.0, None}  # 2: the root of 5 blocks, rounded
    assert {s.horizon for s in settings(110)} == {1.0, 4.0, None}
    assert len({s.name for s in every}) == len(every)
    names = [job.name for job in jobs(asked(["--data", "digits", "--seeds", "2"]))]
    assert len(names) == len(set(names)) == 2 * (1 + len(every))
    assert names[0] == "vanilla-0" and all(name.endswith("-0") for name in names[:25])


def test_each_setting_is_what_the_network_is_made_with(monkeypatch, tmp_path):
    """The words of a job, read by the recipe's own command line."""
    args = asked(["--data", "digits", "--depth", "14", "--epochs", "1", "--seeds", "1"])
    chosen = {Setting(1.0, "random", 100.0), Setting(None, "uniform", 0.1)}
    for job in jobs(args):
        setting = next((s for s in chosen if job.name == f"{s.name}-0"), None)
        if setting is None:
            continue
        (tmp_path / job.name).mkdir()
        monkeypatch.chdir(tmp_path / job.name)
        command = ["cifar.py", "fit", "--config", str(grid.CONFIGS / job.config), *job.args]
        monkeypatch.setattr(sys, "argv", [*command, "--trainer.fast_dev_run", "true"])
        cli = cifar()
        layer = cli.model.net.stage1.particles
        assert (layer.horizon, cli.model.groups["tau_lr_scale"]) == (setting.horizon or 2.0, setting.scale)
        chosen.remove(setting)
    assert not chosen


def test_an_outcome_is_paired_with_its_twin():
    records = made_up()
    best = outcome(Setting(None, "uniform", 100.0), records, 2)
    assert best.errors == {0: 47.0, 1: pytest.approx(48.3)}
    assert best.difference == pytest.approx(-2.85)
    assert best.half_width == pytest.approx(12.706205 * 0.15, rel=1e-5)  # t(1), standard error 0.3 / 2
    assert (best.resorts, best.steps, best.spread) == ([12, 12], (0.5, 1.5), 0.5)
    assert last_error(record(float("nan"))) == 100.0
    del records["vanilla-1"]
    assert outcome(Setting(None, "uniform", 100.0), records, 2).errors == {0: 47.0}
    assert outcome(Setting(None, "uniform", 100.0), {}, 2) is None


def test_the_page_counts_what_is_better_and_names_the_best():
    records, args = made_up(), asked(["--data", "digits", "--seeds", "2"])
    outcomes = [outcome(setting, records, 2) for setting in settings(32)]
    said = "\n".join(findings(outcomes))
    assert "3 of 24 settings with several seeds are better" in said and "0 worse" in said
    assert "Lowest mean: horizon n, uniform start, tau at x100, -2.85 ± 1.91" in said
    assert "change places in 3 settings" in said
    # Against horizon n from a uniform start, which gains 0, 1, 2, 3 with the rate: 0.75 in the mean of both starts.
    assert "Horizon against n, all else equal: 1 +0.71" in said and "(16 pairs)" in said
    ours, theirs = matched(outcomes, "scale", 100.0, 1.0)
    assert len(ours) == 3 * 2 * 2
    assert sum(a != b for a, b in zip(ours, theirs, strict=True)) == 2  # both seeds of horizon n, uniform
    page = rendered(outcomes, records, args, "python it")
    assert "| n | uniform | x100 | 47.65 | -2.85 ± 1.91 | 12, 12 | 0.50 to 1.50 | 50 % |" in page
    assert "50.00, 51.00 % (mean 50.50)" in page
    assert "Made by `python it`: 50 of 50 runs" in page


def test_the_command_writes_page_picture_and_runs(monkeypatch, tmp_path, capsys):
    """The grid's trainings are replaced here; tests of the grid are in test_grid.py."""

    def carry_out(*args, finished):
        finished({"vanilla-0": record(50.0)})
        assert not list(tmp_path.iterdir())
        finished({"vanilla-0": record(50.0), "horizon-n-uniform-tau-lr-x1-0": record(49.0, 1)})
        assert "-1.00 | 1 |" in (tmp_path / "tau_study.md").read_text()
        return made_up()

    monkeypatch.setattr(tau_study, "carry_out", carry_out)
    monkeypatch.setattr(sys, "argv", ["tau_study.py", "--data", "digits", "--seeds", "2", "--out", str(tmp_path)])
    tau_study.main()
    assert (tmp_path / "tau_study.png").read_bytes()[:4] == b"\x89PNG"
    document = json.loads((tmp_path / "tau_study.json").read_text())
    assert len(document["outcomes"]) == 24 and len(document["runs"]) == 50
    assert capsys.readouterr().out.strip() == (tmp_path / "tau_study.md").read_text().strip()


@pytest.mark.parametrize(
    ("args", "part"),
    [(["--depth", "20x"], "invalid int"), (["--depth", "15"], "--depth 15"), (["--data", "folder:nowhere"], "nowhere")],
)
def test_bad_input_is_told_before_anything_is_written(monkeypatch, capsys, tmp_path, args, part):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tau_study.py", *args])
    with pytest.raises(SystemExit) as ended:
        tau_study.main()
    assert ended.value.code == 2
    assert part in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
