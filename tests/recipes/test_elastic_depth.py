"""Elastic depth: ways to train, removal at every depth, and a command that goes on and reports."""

import json
import sys

import pytest
import torch

from recipes import elastic_depth
from recipes.elastic.network import WAYS, Network
from recipes.elastic.report import curves, table
from recipes.elastic.training import Data, Job, at_depths, elastic, spearman, trained
from recipes.images.source import Images


def images(n, seed=0):
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    pixels = torch.randint(0, 60, (n, 1, 6, 6), generator=draws) + 90 * labels.view(n, 1, 1, 1)  # brightness tells
    return Images(pixels.to(torch.uint8), labels)


DATA = Data(images(512), images(90, 1), 3)


def job(way, **more):
    return Job(way, **{"blocks": 4, "seed": 1, "channels": 6, "epochs": 4, "rate": 0.1, **more})


def test_inputs_have_mean_0_and_deviation_1():
    x = DATA.ready(DATA.train.pixels)
    assert x.mean().abs() < 1e-5 and x.std() == pytest.approx(1, abs=1e-3)


def test_blocks_of_the_smallest_steps_are_passed_by():
    net = Network(1, 3, 4, 6, WAYS["T = 4, learned"]).eval()
    net.blocks.set_tau_([0.5, 2.0, 2.25, 4.0])  # steps 0.5, 1.5, 0.25, 1.75
    x = torch.randn(2, 1, 6, 6)
    net.pass_by_(2)
    without = net(x)
    assert [b.passed_by for b in net.blocks] == [True, False, True, False]
    net.pass_by_(0)
    for i in (0, 2):
        torch.nn.init.zeros_(net.blocks[i].inside.conv2.weight)
    assert torch.equal(net(x), without)


def test_a_horizon_shrinks_to_the_one_that_was_asked_for():
    net = Network(1, 3, 4, 6, WAYS["T = 8 to 4, learned"])
    assert net.blocks.tau[-1].item() == 8
    net.shrink_(0.5)
    assert net.blocks.tau.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_learns_and_repeats_itself(way):
    x, y = DATA.ready(DATA.test.pixels), DATA.test.labels
    nets = [trained(job(way), DATA).eval() for _ in range(2)]
    with torch.no_grad():
        assert torch.equal(nets[0](x), nets[1](x))
        assert (nets[0](x).argmax(1) != y).float().mean() < 0.45  # by chance 0.67
    steps = nets[0].blocks.steps()
    assert (steps != steps[0]).any() == WAYS[way].learn
    assert not any(b.passed_by for b in nets[0].blocks)


def test_fewer_blocks_are_the_network_without_those_of_the_smallest_steps():
    net = trained(job("T = 4, learned"), DATA)
    scoring = [(DATA.ready(DATA.train.pixels[:64]), DATA.train.labels[:64])]
    testing = [(DATA.ready(DATA.test.pixels), DATA.test.labels)]
    found = at_depths(net, "step", [3], scoring, testing)
    net.pass_by_(1)
    net.train()
    for norm in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None
    net(scoring[0][0])
    net.eval()
    wrong = (net(testing[0][0]).argmax(1) != testing[0][1]).float().mean().item()
    assert found == {3: pytest.approx(100 * wrong, abs=1.2)}  # one image of 90 may be a tie


def test_a_run_has_an_error_at_every_depth():
    run = elastic(job("T = 4, learned"), DATA, [2, 3], ["step", "leave_one_out"])
    assert [sorted(e) for e in run.errors.values()] == [[2, 3, 4]] * 2
    assert run.errors["step"][4] == run.errors["leave_one_out"][4] and len(run.steps) == 4
    assert -1 <= run.agreement <= 1
    assert elastic(job("T = n, fixed", blocks=2), DATA, [], ["leave_one_out"]).agreement is None
    assert spearman([1.0, 2.0, 3.0], [5.0, 6.0, 9.0]) == pytest.approx(1) and spearman([1.0, 1.0], [1.0, 2.0]) is None


def test_the_report_puts_networks_trained_at_each_depth_beside_removal():
    def row(way, blocks, errors, seed=1):
        return {"way": way, "blocks": blocks, "seed": seed, "errors": errors, "steps": [0.5, 1.5], "agreement": None}

    runs = [row("T = 4, learned", 4, {"step": {"2": 9.0, "4": 5.0}}) | {"agreement": 0.8}]
    runs += [row("T = 4, learned", 4, {"step": {"2": 11.0, "4": 6.0}}, 2) | {"agreement": 0.9}]
    runs += [row("T = n, fixed", 4, {"cosine": {"2": 20.0, "4": 5.0}}), row("T = n, fixed", 2, {"cosine": {"2": 7.0}})]
    assert curves(runs, 4)["trained at each depth"] == {4: [5.0], 2: [7.0]}
    text = table(runs, 4)
    assert "| T = 4, learned; by step | 5.50 | 10.00 | 2 |" in text
    assert "| T = n, fixed; by cosine | 5.00 | 20.00 | 1 |" in text
    assert "| trained at each depth | 5.00 | 7.00 | 1 |" in text
    assert "- T = 4, learned: Spearman of step and leave-one-out 0.80, 0.90; steps 0.50 to 1.50." in text


def test_the_command_goes_on_and_draws(tmp_path, monkeypatch, capsys):
    arguments = ["--data", "digits", "--side", "8", "--blocks", "3", "--kept", "2", "--ways", "T = 4, learned"]
    arguments += ["--seeds", "1", "--images", "256", "--test-images", "50", "--epochs", "1", "--channels", "4"]
    monkeypatch.setattr(sys, "argv", ["elastic_depth.py", *arguments, "--out", str(tmp_path)])
    elastic_depth.main()
    document = json.loads((tmp_path / "elastic_depth.json").read_text())
    assert [(r["way"], r["blocks"]) for r in document["runs"]] == [
        ("T = 4, learned", 3), ("T = n, fixed", 3), ("T = n, fixed", 2)
    ]  # fmt: skip
    assert sorted(document["milliseconds"]) == ["2", "3"] and str(tmp_path) not in json.dumps(document)
    assert (tmp_path / "elastic_depth.png").stat().st_size > 10_000
    assert table(document["runs"], 3) in (tmp_path / "elastic_depth.md").read_text()
    monkeypatch.setattr(elastic_depth, "elastic", lambda *_: pytest.fail("a finished run was made again"))
    elastic_depth.main()
    monkeypatch.setattr(sys, "argv", ["elastic_depth.py", "--kept", "16"])
    with pytest.raises(SystemExit):
        elastic_depth.arguments()
    assert "1 to below --blocks 16" in capsys.readouterr().err
