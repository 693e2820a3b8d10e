"""Fine-tuning arm against arm: the arms begin as one function, the grid goes on, the report says what the runs say."""

import json
import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from recipes.backbones.cifar_resnet import FILES, MEAN, STD, CifarResNet
from recipes.backbones.networks import Network
from recipes.evidence import criteria, finetune, page
from recipes.evidence import report as reports
from recipes.evidence.arms import ARMS, Scaled, scaled_modules
from recipes.evidence.rows import best_rate, whole_seeds
from recipes.evidence.training import Data, Job, Run, batches, error, factor, fine_tune, in_segments, some_of
from recipes.images.source import Images
from torch_meanfield import conversion_report, convert


def made(*_):
    torch.manual_seed(7)
    model = CifarResNet((2, 3, 2), 3)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.5)
    return model


TINY = Network("tiny", made, MEAN, STD, side=8)


def images(n, seed=0):
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    pixels = torch.randint(0, 80, (n, 3, 8, 8), generator=draws)
    pixels[torch.arange(n), labels] += 120
    return Images(pixels.to(torch.uint8), labels)


DATA = Data(images(300), images(30, 1), images(60, 2), 3)


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_begins_with_the_function_of_the_network(name):
    x = TINY.prepared(images(4).pixels)
    model = ARMS[name].applied(made(), x[:2])
    for training in (False, True):
        assert torch.equal(model.train(training)(x), made().train(training)(x))
    learned = [p for group in ARMS[name].groups(model, 0.1) for p in group["params"]]
    assert sorted(map(id, learned)) == sorted(map(id, model.parameters()))


def test_factors_and_times_have_their_own_rate_and_no_weight_decay():
    x = TINY.prepared(images(2).pixels)
    for name, scale in (("converted, tau x10", 10.0), ("scale, x3", 3.0), ("LayerScale", 1.0)):
        weights, factors = ARMS[name].groups(ARMS[name].applied(made(), x), 0.01)
        assert weights["weight_decay"] > 0 and factors["weight_decay"] == 0
        assert factors["lr"] == pytest.approx(0.01 * scale)
    (only,) = ARMS["plain"].groups(made(), 0.01)
    assert len(only["params"]) == len(list(made().parameters()))


def test_the_control_scales_the_branches_that_conversion_would():
    x = TINY.prepared(images(2).pixels)
    names = scaled_modules(made(), x)
    # The first block of a stage that changes the shape is no particle; a lone block has nobody to change places with.
    assert names == ["layer1.0.bn2", "layer1.1.bn2", "layer2.1.bn2", "layer2.2.bn2"]
    scaled, converted = (ARMS[name].applied(made(), x).eval() for name in ("scale, no order", "converted"))
    steps = [0.5, 1.25, 2.0, 0.75]
    for module, step in zip((m for m in scaled.modules() if isinstance(m, Scaled)), steps, strict=True):
        torch.nn.init.constant_(module.factor, step)
    for stage, (a, b) in zip(converted_stages(converted), (steps[:2], steps[2:]), strict=True):
        stage.set_tau_([a, a + b])
    assert torch.allclose(scaled(x), converted(x), atol=1e-6) and not torch.allclose(scaled(x), made().eval()(x))


def converted_stages(model):
    return [stage.module for stage in conversion_report(model)]


def test_the_arms_of_a_seed_see_the_same_batches():
    first, again, other = (list(batches(DATA.train, 5, seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    assert not torch.equal(first[0][1], other[0][1])
    assert len(first[0][1]) == 128
    seen = torch.cat([pixels for pixels, _ in batches(DATA.train, 1, 0)])
    known = {p.numpy().tobytes() for p in DATA.train.pixels} | {p.flip(2).numpy().tobytes() for p in DATA.train.pixels}
    assert {p.numpy().tobytes() for p in seen} <= known


def test_a_run_learns_and_repeats_itself():
    jobs = [Job("tiny", arm, 0.05, 12, 3, precision=p) for arm, p in (("plain", "32"), ("converted", "bf16"))]
    for job in jobs:
        run, again = (fine_tune(job, TINY, DATA, Path()) for _ in range(2))
        assert run.loss == again.loss and run.error == again.error and len(run.loss) == 10
        assert run.loss[-1] < 0.5 * run.loss[0] and run.error < 40
    assert len(run.factors) == 4 and run.factors != [1.0] * 4
    tuning = fine_tune(replace(jobs[0], on="tuning", steps=1), TINY, DATA, Path())
    assert round(tuning.error * 0.3) == pytest.approx(tuning.error * 0.3)  # of 30 images


def test_a_run_that_diverges_says_so_and_its_rate_is_not_chosen(tmp_path, monkeypatch):
    monkeypatch.setitem(finetune.NETWORKS, "tiny", TINY)
    grid = finetune.Grid(tmp_path, DATA, Path())
    runs = [grid.run(Job("tiny", "plain", rate, 4, 1, "tuning")) for rate in (1e12, 0.01)]
    assert math.isnan(runs[0].error) and math.isfinite(runs[1].error)
    assert math.isnan(grid.done(runs[0].job).error)
    found = [(run.job.rate, run.error) for run in runs]
    assert best_rate(found, "plain") == 0.01
    with pytest.raises(ValueError, match="plain diverged at every rate"):
        best_rate(found[:1], "plain")


def test_small_parts():
    assert [round(factor(s, 10, 2), 3) for s in (0, 1, 2, 6, 9)] == [0.5, 1.0, 1.0, 0.5, 0.038]
    assert in_segments([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
    some = some_of(Images(torch.arange(9).view(9, 1, 1, 1), torch.arange(9)), 4)
    assert len(set(some.labels.tolist())) == 4 and some.labels.tolist() != [0, 1, 2, 3]
    assert torch.equal(some.pixels.flatten(), some.labels)


@pytest.fixture
def folder(tmp_path):
    """Two classes of images, and a file like the public one."""
    rng = numpy.random.default_rng(0)
    for split, count in (("train", 12), ("test", 8)):
        for label, name in enumerate(("dark", "light")):
            where = tmp_path / "data" / split / name
            where.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (32, 32, 3)) + 130 * label
                Image.fromarray(pixels.astype("uint8")).save(where / f"{i}.png")
    torch.manual_seed(0)
    state = {f"module.{k}": v for k, v in CifarResNet((3, 3, 3)).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / FILES[20])
    return tmp_path


def test_the_command_runs_goes_on_and_reports(folder, monkeypatch, capsys):
    out = folder / "out"
    arguments = ["--weights", str(folder), "--data", f"folder:{folder / 'data'}", "--label", "two", "--out", str(out)]
    arguments += ["--rates", "0.01", "0.001", "--steps", "2", "--seeds", "5", "6", "--arms", "plain", "converted"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *arguments])
    finetune.main()
    document = json.loads((out / "finetune.json").read_text())
    assert [r["on"] for r in document["runs"]] == ["tuning"] * 4 + ["report"] * 4
    assert [(r["arm"], r["seed"]) for r in document["runs"][4:]] == [
        (arm, seed) for seed in (5, 6) for arm in ("plain", "converted")
    ]
    assert str(folder) not in json.dumps(document)  # no path of this machine
    monkeypatch.setattr(finetune, "fine_tune", lambda *_: pytest.fail("a finished run was made again"))
    finetune.main()
    assert json.loads((out / "finetune.json").read_text())["runs"] == document["runs"]

    monkeypatch.setattr(sys, "argv", ["report.py", str(out / "finetune.json"), "--out", str(folder / "results")])
    reports.main()
    assert (folder / "results" / "learned_steps.png").stat().st_size > 10_000
    text = (folder / "results" / "learned_steps.md").read_text()
    assert "resnet20 on two, 2 steps of fine-tuning" in text and "| converted |" in text
    capsys.readouterr()


def test_seeds_must_be_fresh(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--weights", ".", "--data", "cifar10", "--seeds", "1", "2"])
    with pytest.raises(SystemExit):
        finetune.arguments()
    assert "must differ" in capsys.readouterr().err


def row(arm, error, seed, on="report", rate=0.1, **more):
    run = finetune.as_json(Run(Job("net", arm, rate, 100, seed, on), error, [1.0, 0.5]))
    return {**run.pop("job"), **run, **more}


def test_the_report_says_what_the_runs_say():
    runs = [row("plain", 14.0, 1, "tuning"), row("plain", 12.0, 1, "tuning", 0.01)]
    runs += [row("converted", math.nan, 1, "tuning"), row("converted", 11.0, 1, "tuning", 0.01)]
    runs += [row("plain", e, s) for s, e in ((5, 12.0), (6, 13.0), (7, 12.5))]
    runs += [row("converted", e, s, factors=[0.9, 1.2]) for s, e in ((5, 11.0), (6, 12.1), (7, 11.4))]
    runs += [row("scale, no order", e, s, factors=[1.0]) for s, e in ((5, 11.2), (6, 12.0), (7, 11.3))]
    assert "| plain | **12.00** | 14.00 |" in reports.rates_table(runs)
    assert "| converted | **11.00** | diverged |" in reports.rates_table(runs)
    more = [*runs, row("plain", 12.5, 1, "tuning", 0.003)]  # a rate that only one arm was tried at
    assert "| converted |  | **11.00** | diverged |" in reports.rates_table(more)
    table = reports.results_table(runs)
    # Differences -1, -0.9, -1.1: mean -1, deviation 0.1, Student's 4.303 for three.
    assert "| converted | 0.1 | 11.00 | 12.10 | 11.40 | 11.50 | -1.00 ± 0.25 | +0.00 ± 0.43 |" in table
    assert "| 0 | 0.90 to 1.20 |" in table
    said = reports.verdicts(runs)
    assert said[0] == "- converted: better than plain (-1.00 ± 0.25 points; lower in 3 of 3 pairs)."
    assert reports.edges(runs) == [
        "Best at an edge of the rates, so perhaps better beyond it: plain (lowest tried, 0.01), converted (lowest "
        "tried, 0.01).\n"
    ]
    assert whole_seeds([*runs, row("plain", 9.0, 8)]) == runs  # a seed that the other arms have not seen
    assert said[1].startswith("- converted: not distinguishable from scale, no order (+0.00")


def test_criteria_are_compared_and_the_page_is_made_of_the_files(folder, monkeypatch, capsys):
    results, kept = folder / "results", folder / "kept"
    arguments = ["--weights", str(folder), "--data", f"folder:{folder / 'data'}", "--label", "two", "--kept", str(kept)]
    arguments += ["--network", "resnet20", "--removed", "2", "5", "--by", "cosine", "random", "--draws", "2"]
    monkeypatch.setattr(sys, "argv", ["criteria.py", *arguments, "--out", str(results)])
    criteria.main()
    document = json.loads((results / "prune_criteria.json").read_text())
    cosine, one, other = document["rows"]
    assert sorted(cosine["order"]) == sorted(one["order"]) == sorted(other["order"]) and one["order"] != other["order"]
    assert list(cosine["errors"]) == ["2", "5"] and len(cosine["order"]) == 7 and document["images"] == 8
    assert str(folder) not in json.dumps(document)
    monkeypatch.setattr(criteria, "measured", lambda *_: pytest.fail("what is done was done again"))
    criteria.main()
    text = (results / "prune_criteria.md").read_text()
    assert "| cosine | " in text and " to " in next(line for line in text.splitlines() if line.startswith("| random"))

    monkeypatch.setattr(sys, "argv", ["page.py", "--results", str(results), "--page", str(folder / "results.md")])
    page.main()
    written = (folder / "results.md").read_text()
    assert criteria.table(document) in written
    assert "`python recipes/elastic_depth.py --data fashion-mnist` does" in written
    capsys.readouterr()


def test_a_reference_that_removes_by_hand_finds_the_same_error(folder):
    data = Data(images(96), images(8), images(64, 3), 3)
    network = replace(TINY, name="by hand")
    model = convert(made().eval(), network.prepared(data.train.pixels[:2]))
    with torch.no_grad():
        model.layer1[1].bn2.weight *= 1e-3
    args = Namespace(removed=[1], scored=96, images=64)
    row = criteria.measured("leave_one_out", 0, model, network, data, args)
    first = row["order"][0]
    by_hand = made()
    by_hand.load_state_dict({k: v for k, v in model.state_dict().items() if "tau_axis" not in k})
    stage, number = first.split(".")
    blocks = list(getattr(by_hand, stage))
    setattr(by_hand, stage, torch.nn.Sequential(*(b for i, b in enumerate(blocks) if str(i) != number)))
    x = network.prepared(some_of(data.train, 96).pixels)
    torch.optim.swa_utils.update_bn([x], by_hand)
    assert row["errors"][1] == error(by_hand, network, some_of(data.report, 64))


def test_the_page_in_the_docs_is_what_the_files_make():
    root = Path(__file__).resolve().parents[2]
    assert (root / "docs" / "results.md").read_text() == page.page(root / "benchmarks" / "results", root / "docs")


def test_rates_are_tried_beyond_an_edge_until_the_best_is_at_none(tmp_path, monkeypatch):
    args = Namespace(networks=["net"], steps=[9], arms=["plain"], rates=[0.01, 0.03], tuning_seeds=[1], seeds=[5])
    args.precision, args.bracket = "32", True

    class Known(finetune.Grid):
        def run(self, job):
            return Run(job, {0.001: 12.0, 0.003: 11.0, 0.01: 13.0}.get(job.rate, 15.0), [1.0])

    jobs = list(finetune.walk(Known(tmp_path, DATA, Path()), args))
    assert [j.rate for j in jobs] == [0.01, 0.03, 0.003, 0.001, 0.003] and jobs[-1].on == "report"
    args.bracket = False
    assert [j.rate for j in finetune.walk(Known(tmp_path, DATA, Path()), args)] == [0.01, 0.03, 0.01]
    assert finetune.beyond([0.1, 0.3], 0.3) == 1.0 and finetune.beyond([0.02, 0.05], 0.02) == 0.01
