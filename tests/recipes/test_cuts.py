"""Cut networks after fine-tuning: every arm is cut, trained and told; channels come to the latency asked for."""

import json
import sys

import pytest
import torch
from PIL import Image

from recipes.backbones.cifar_resnet import MEAN, STD, CifarResNet, with_convolutions
from recipes.backbones.networks import NETWORKS, Network
from recipes.cuts import channels
from recipes.cuts.report import by_part, report, table
from recipes.cuts.training import Job, Setting, Workshop
from recipes.evidence import cuts
from recipes.evidence.training import Data
from recipes.images.source import Images


def made(blocks):
    def make(*_):
        torch.manual_seed(7)
        return CifarResNet(blocks, 3)

    return make


def images(n, seed=0):
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    pixels = torch.randint(0, 80, (n, 3, 8, 8), generator=draws)
    pixels[torch.arange(n), labels] += 120
    return Images(pixels.to(torch.uint8), labels)


DATA = Data(images(256), images(30, 1), images(60, 2), 3)
SETTING = Setting("tiny", "small", adapt=3, adapt_rate=0.02, scored=128)


@pytest.fixture
def shop(tmp_path, monkeypatch):
    for name, blocks in (("tiny", (3, 3, 2)), ("small", (1, 1, 1))):
        network = Network(name, made(blocks), MEAN, STD, side=8, traceable=with_convolutions)
        monkeypatch.setitem(NETWORKS, name, network)
    return Workshop(SETTING, DATA, tmp_path, tmp_path)


def test_shortcuts_as_convolutions_compute_the_same():
    model, x = made((2, 2, 2))().eval(), torch.randn(2, 3, 8, 8)
    explicit = with_convolutions(model)
    assert torch.equal(explicit(x), model(x))
    assert [b.shortcut is not None for b in (explicit.layer1[0], explicit.layer2[0], explicit.layer2[1])] == [0, 1, 0]
    assert model.layer2[0].shortcut is None and not set(model.state_dict()) - set(explicit.state_dict())


def test_a_network_is_adapted_once(shop):
    before = made((3, 3, 2))().state_dict()
    first, again = (shop.adapted("tiny").state_dict() for _ in range(2))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["conv1.weight"], before["conv1.weight"])


def test_blocks_go_in_the_order_of_the_criterion(shop):
    order = shop.order("greedy")
    model, gone = shop.without_blocks("greedy", 2)
    assert (
        gone == order[:2] and len(order) == 5
    )  # three of the first stage, two of the second; a lone one of its kind stays
    assert sum(len(getattr(model, f"layer{i}")) for i in (1, 2, 3)) == 6
    assert type(model) is CifarResNet and not [n for n, _ in model.named_parameters() if "tau" in n]
    assert shop.order("random", 1) != shop.order("random", 2) and shop.order("random", 1) == shop.order("random", 1)
    assert sorted(shop.order("random", 1)) == sorted(order)


@pytest.mark.parametrize("arm", ["cosine", "random", "sibling", "whole"])
def test_an_arm_learns_and_repeats_itself(shop, arm):
    job = Job(arm, 0 if arm in cuts.UNCUT else 2, 0.05, 8, 3)
    run = shop.run(job)
    assert shop.done(job) and shop.run(job) == run
    shop._path(job.key).unlink()
    again = shop.run(job)
    assert again["loss"] == run["loss"] and again["error"] == run["error"] < 40
    assert (again["faster"] > 1) == (arm != "whole") or arm == "whole"
    assert run["all"] == pytest.approx((60 * run["error"] + 30 * shop.run(tuning(job))["error"]) / 90)
    assert run["loss"][-1] < run["loss"][0]


def tuning(job):
    return Job(job.arm, job.removed, job.rate, job.steps, job.seed, "tuning")


def test_a_run_that_diverges_has_no_error(shop):
    run = shop.run(Job("whole", 0, 1e12, 4, 1))
    assert run["error"] is None and json.loads(json.dumps(run, allow_nan=False)) == run


@pytest.mark.parametrize("way", channels.WAYS)
def test_channels_are_cut_on_the_stream_too(shop, way):
    pytest.importorskip("torch_pruning")
    model = shop.adapted("tiny")
    fewer = channels.pruned(model, shop.network, shop.scoring, way, 0.5)
    assert fewer.conv1.out_channels < 16 and fewer.linear.out_features == 3
    assert fewer.layer2[0].shortcut.out_channels == fewer.layer2[1].conv2.out_channels < 32
    assert fewer(shop.scoring[0][0]).shape == (128, 3)
    x = fewer.conv1(shop.scoring[0][0])
    assert torch.allclose(fewer.bn1.running_mean, x.mean((0, 2, 3)), atol=1e-4)  # norms are re-estimated
    assert model.conv1.out_channels == 16


def test_the_ratio_is_the_least_that_is_fast_enough(shop, monkeypatch):
    pytest.importorskip("torch_pruning")
    counted = lambda models, *_, **__: [sum(p.numel() for p in m.parameters()) for m in models]  # noqa: E731
    monkeypatch.setattr(channels, "times", counted)  # parameters in place of milliseconds: these repeat themselves
    model, reference = shop.adapted("tiny"), shop.without_blocks("greedy", 3)[0]
    (goal,) = counted([reference])
    for way in ("norm, uniform", "taylor, global"):
        ratio = channels.ratio_for(model, shop.network, shop.scoring, way, reference)
        sizes = [
            counted([channels.pruned(model, shop.network, shop.scoring, way, r)])[0]
            for r in (ratio - 1 / channels.GRID, ratio)
        ]
        assert sizes[1] <= goal < sizes[0]


def test_the_command_goes_on_where_it_stopped_and_reports(shop, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch_pruning")
    monkeypatch.setattr(
        channels, "times", lambda models, *_, **__: [sum(p.numel() for p in m.parameters()) for m in models]
    )
    for split, count in (("train", 60), ("test", 30)):
        some = images(count, len(split))
        for i in range(count):
            folder = tmp_path / "data" / split / f"class{some.labels[i]}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(some.pixels[i].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    words = f"--weights {tmp_path} --data folder:{tmp_path}/data --network tiny --sibling small --removed 2 --adapt 2"
    words += (
        f" --arms greedy channels sibling --steps 3 --seeds 4 5 --scored 32 --kept {tmp_path}/kept --out {tmp_path}"
    )
    monkeypatch.setattr(sys, "argv", ["cuts.py", *words.split()])
    cuts.main()
    document = json.loads((tmp_path / "cuts_tiny.json").read_text())
    text = (tmp_path / "cuts_tiny.md").read_text()
    assert len(document["runs"]) == 3 * (2 + 2) and (tmp_path / "cuts_tiny.png").stat().st_size > 1000
    assert len(document["channels"]["2"]) == len(channels.WAYS) and "was taken" in text
    assert "Rates were chosen on" in text and "One rate" not in text
    alike = {**document, "runs": [{**run, "rate": 0.03} for run in document["runs"]]}
    assert "One rate for all arms, 0.03, not tuned" in report(alike)
    monkeypatch.setattr(Workshop, "_fine_tuned", lambda *_: pytest.fail("made twice"))
    cuts.main()
    assert json.loads((tmp_path / "cuts_tiny.json").read_text())["runs"] == document["runs"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--seeds 1", "must differ"),
        ("--arms sibling", "go together"),
        ("--sibling small", "go together"),
        ("--removed 60", "60"),
    ],
)
def test_bad_input_is_named(shop, tmp_path, monkeypatch, capsys, more, said):
    torch.save(
        {s: (i.pixels, i.labels) for s, i in (("train", DATA.train), ("test", DATA.report))}, tmp_path / "images-x.pt"
    )
    monkeypatch.setattr(cuts, "load", lambda args: (DATA, "x"))
    words = (
        f"--weights {tmp_path} --data cifar10 --network tiny --adapt 0 --steps 1 --arms cosine --kept {tmp_path} {more}"
    )
    monkeypatch.setattr(sys, "argv", ["cuts.py", *words.split()])
    with pytest.raises(SystemExit) as end:
        cuts.main()
    assert end.value.code == 2 and said in capsys.readouterr().err


def row(arm, seed, error, on="report", rate=0.01, removed=2):
    more = {"all": error, "faster": 2.0, "parameters": 10, "gone": [], "loss": [1.0], "seconds": 1.0, "steps": 3}
    return {"arm": arm, "seed": seed, "error": error, "on": on, "rate": rate, "removed": removed, **more}


def test_the_table_pairs_each_arm_with_greedy_at_the_same_depth(tmp_path):
    runs = [row("greedy", 1, 10.0, "tuning"), row("cosine", 1, None, "tuning")]
    runs += [row("greedy", s, 10.0 + s) for s in (4, 5)] + [row("cosine", s, 12.0 + s) for s in (4, 5)]
    runs += [row("sibling", s, 9.0, removed=0) for s in (4, 5)]
    document = {"runs": runs, "setting": {"sibling": "small"}}
    greedy, cosine, sibling = table(document).splitlines()[2:]
    assert "| 14.00 | 15.00 | 14.50 |  | 14.50 | 0.01: 10.00 |" in greedy
    assert "| 16.50 | +2.00 ± 0.00 |" in cosine and "0.01: diverged" in cosine
    assert "sibling (small)" in sibling and "| 9.00 |  |" in sibling
    assert list(by_part(runs, "report")) == [(2, "greedy"), (2, "cosine"), (0, "sibling")]
