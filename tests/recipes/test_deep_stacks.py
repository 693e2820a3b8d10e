"""The comparisons of deep stacks, rates and horizons: forms are their formulas, grids go on, reports say the runs."""

import json
import math

import pytest
import torch
from torch import nn

from recipes.evidence import deep, rates, times, tries
from recipes.evidence.arms import Scaled
from recipes.evidence.stacks import FORMS, Chain, Classifier, pre_norm_branch, relu_branch
from recipes.evidence.training import Data
from recipes.images.source import Images

WIDTH = 6


def branches(n=4):
    torch.manual_seed(0)
    return [relu_branch(WIDTH).double() for _ in range(n)]


def by_hand(form, x, n=4):
    factor = {
        "learned factors from 0 (ReZero)": 0.0,
        "learned factors from 1/sqrt n": 1 / math.sqrt(n),
        "steps fixed at 1/n": 1 / n,
        "steps fixed at 1/sqrt n": 1 / math.sqrt(n),
        "horizon 1, learned": 1 / n,
        "horizon sqrt n, learned": 1 / math.sqrt(n),
    }.get(form, 1.0)
    for branch in branches(n):
        out = factor * branch(x)
        x = out if form == "no stream" else x + out
        if form == "layer norm":
            x = nn.functional.layer_norm(x, (WIDTH,))
    return x


@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_stack_is_its_formula(form):
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    stack = FORMS[form](branches(), WIDTH).double()
    assert torch.allclose(stack(x), by_hand(form, x), atol=1e-12)
    assert len(stack.steps()) == 4


def test_factors_are_learned_each_alone():
    chain = Chain(*branches(), factor=0.0).double()
    chain(torch.randn(3, WIDTH, dtype=torch.float64)).square().sum().backward()
    assert chain.factors.grad.shape == (4,) and bool((chain.factors.grad != 0).any())


@pytest.mark.parametrize("horizon", [0.0, 2.0])
def test_the_optimizer_makes_up_for_the_size_of_the_steps(horizon):
    job = rates.Job(8, horizon, "sgd", 0.1, 5, 1)
    stack = rates.MeanFieldSequential(
        *(pre_norm_branch(WIDTH) for _ in range(8)), horizon=horizon or None, learn_tau=False
    )
    model = Classifier(stack, 12, WIDTH, 3)
    ends, blocks = rates.optimizer_of(job, model).param_groups
    share = horizon / 8 if horizon else 1.0
    assert ends["lr"] == 0.1 and blocks["lr"] == pytest.approx(0.1 / share)
    assert len(ends["params"]) + len(blocks["params"]) == len(list(model.parameters()))
    adam = rates.optimizer_of(rates.Job(8, horizon, "adam", 0.1, 5, 1), model)
    assert [g["eps"] for g in adam.param_groups] == [rates.EPS, pytest.approx(rates.EPS * share)]


@pytest.mark.parametrize("name, step", [("vanilla", 1.0), ("T = sqrt n, learned", 3**-0.5), ("T = 1, fixed", 1 / 3)])
def test_a_network_begins_with_the_steps_of_its_arm(name, step):
    first = times.stages(times.network(times.ARMS[name], 20, 3))[0]
    assert first.steps().tolist() == pytest.approx([step] * 3, abs=1e-6)
    assert (first.tau_axis.offset is not None) is (times.ARMS[name].form == "learned")
    x = expected = torch.randn(2, 16, 4, 4)
    for branch in first:
        expected = expected + step * branch.eval()(expected)
    assert torch.allclose(first.eval()(x), expected, atol=1e-5)


def test_factors_from_0_leave_the_stream_alone():
    net = times.network(times.ARMS["factors from 0 (SkipInit)"], 20, 3).eval()
    layer, x = times.stages(net)[1], torch.randn(2, 32, 4, 4)
    assert torch.equal(layer(x), x)
    assert sum(isinstance(m, Scaled) for m in net.modules()) == sum(len(s) for s in times.stages(net))


def test_a_diverging_run_is_told_and_not_averaged(tmp_path):
    x, y = torch.full((20, 4), 1e38), torch.arange(20) % 3
    model = nn.Linear(4, 3)
    row = tries.descend(model, torch.optim.SGD(model.parameters(), lr=1e30), tries.drawn(x, y, 5, 8, 0))
    assert row == {"loss": None, "curve": []}


def images(n):
    draws = torch.Generator().manual_seed(n)
    return Images(torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=draws), torch.arange(n) % 3)


def grid(script, monkeypatch, tmp_path, *words):
    data = Data(images(160), images(20), images(30), 3)
    monkeypatch.setattr(script, "load", lambda args: (data, "noise"))
    base = [script.__name__, "--data", "folder:x", "--kept", str(tmp_path / "kept"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*base, *map(str, words)])
    threads = torch.get_num_threads()
    try:
        script.main()
    finally:
        torch.set_num_threads(threads)
    return json.loads((tmp_path / "out" / f"{script.NAME}.json").read_text())


QUICK = {
    deep: ("--blocks", 3, "--width", 8, "--steps", 10, "--batch", 10, "--seeds", 1),
    rates: ("--blocks", 2, 4, "--steps", 10, "--long-blocks", 2, "--long-steps", 10, "--optimizers", "adam"),
    times: ("--side", 8, "--images", 128, "--epochs", 1, "--seeds", 1, 2, "--arms", "vanilla", "T = 1, learned"),
}


@pytest.mark.parametrize("script", QUICK, ids=lambda s: s.NAME)
def test_a_grid_is_told_and_goes_on_where_it_stopped(script, monkeypatch, tmp_path, capsys):
    found = grid(script, monkeypatch, tmp_path, *QUICK[script])
    text = (tmp_path / "out" / f"{script.NAME}.md").read_text()
    assert found["command"] in text and str(tmp_path) not in text
    stored = (tmp_path / "out" / f"{script.NAME}.json").read_text()
    assert str(tmp_path) not in stored and "folder:x" not in stored
    assert (tmp_path / "out" / f"{script.NAME}.png").stat().st_size > 5000
    runs = sorted((tmp_path / "kept" / "runs").glob("*.json"))
    assert len(runs) == len({json.dumps(r, sort_keys=True) for r in found["rows"]})
    kept = {path: path.stat().st_mtime_ns for path in runs[1:]}
    runs[0].unlink()
    again = grid(script, monkeypatch, tmp_path, *QUICK[script])
    assert runs[0].is_file() and all(path.stat().st_mtime_ns == at for path, at in kept.items())
    for one, other in zip(found["rows"], again["rows"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.parametrize("script", QUICK, ids=lambda s: s.NAME)
def test_what_is_done_of_a_grid_is_told_without_making_the_rest(script, monkeypatch, tmp_path, capsys):
    whole = grid(script, monkeypatch, tmp_path, *QUICK[script])
    runs = sorted((tmp_path / "kept" / "runs").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    assert f"all {whole['due']} runs" in (tmp_path / "out" / f"{script.NAME}.md").read_text()
    for kept in (len(runs) - 1, 1):
        for path in runs[kept:]:
            path.unlink(missing_ok=True)
        part = grid(script, monkeypatch, tmp_path, *QUICK[script], "--only-done")
        assert len(part["rows"]) == kept and part["due"] == whole["due"] and part["command"] == whole["command"]
        assert f"{kept} of {whole['due']} runs so far" in (tmp_path / "out" / f"{script.NAME}.md").read_text()
        assert len(list((tmp_path / "kept" / "runs").glob("*.json"))) == kept
    runs[0].unlink()
    with pytest.raises(SystemExit):
        grid(script, monkeypatch, tmp_path, *QUICK[script], "--only-done")
    assert "--only-done" in capsys.readouterr().err


def long_runs(horizon, losses):
    """Rows of long runs from ``{rate: {seed: loss}}``."""
    base = {"optimizer": "adam", "blocks": 4, "horizon": horizon, "steps": 9}
    return [base | {"rate": rate, "seed": s, "loss": loss} for rate, of in losses.items() for s, loss in of.items()]


def test_the_best_long_rate_is_chosen_on_seeds_that_all_rates_have():
    settings = {"horizon": 2.0, "long_steps": 9, "long_seeds": [11, 12], "optimizers": ["adam"], "long_blocks": [4]}
    rows = long_runs(0.0, {1.0: {11: 3.0, 12: 3.2}, 2.0: {11: 2.0, 12: 2.2}, 4.0: {11: 2.5, 12: 0.0}})
    assert rates.best_of_long(rows, "adam", 4, 0.0, settings) == (4.0, {11: 2.5, 12: 0.0}, ", highest tried")
    assert rates.best_of_long(rows[:-1], "adam", 4, 0.0, settings) == (2.0, {11: 2.0}, "")
    assert rates.best_of_long(rows[:4], "adam", 4, 0.0, settings) is None
    diverged = [r | {"loss": None} for r in rows]
    assert rates.best_of_long(diverged, "adam", 4, 0.0, settings) is None
    other = long_runs(2.0, {1.0: {11: 1.0, 12: 1.1}, 2.0: {11: 0.5, 12: 0.7}, 4.0: {11: None}})
    table, said = rates.long_table(rows[:-2] + [rows[-2]] + other, settings)
    assert "| adam, 4 blocks, T = 2 | 2 | 1 | 0.500 | -1.500 |" in table
    assert said == ["- adam, 4 blocks, 9 steps: T = 2 ends neither lower nor higher than T = n."]
    assert rates.long_table(rows, settings)[1] == ["- adam, 4 blocks, 9 steps, T = 2: not finished."]


def test_verdicts_follow_the_numbers():
    def row(form, loss):
        return {"blocks": 4, "form": form, "loss": loss, "seed": 1}

    rows = [row(deep.OURS, 1.0), row(deep.PEER, 2.0)]
    assert any(f"{deep.OURS} ends lower than" in line for line in deep.verdicts({"rows": rows}))
    rows = [row(deep.OURS, None), row(deep.PEER, 2.0)]
    assert any(f"{deep.OURS} ends not lower than" in line for line in deep.verdicts({"rows": rows}))


@pytest.mark.parametrize(
    "script, words, named",
    [(rates, ("--horizon", "-1"), "--horizon -1"), (times, ("--images", "3"), "--images 3")],
    ids=["rates", "times"],
)
def test_bad_input_is_named_before_anything_runs(script, words, named, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        grid(script, monkeypatch, tmp_path, *words)
    assert named in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()
