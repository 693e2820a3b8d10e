"""The pruning command as its users give it: what goes, what a run leaves, resuming, and bad input."""

import json
import sys
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from recipes.backbones.cifar_resnet import CifarResNet
from recipes.finetune.data import FinetuneData
from recipes.finetune.export import NotTheSame
from recipes.finetune.model import Backbone
from recipes.prune_depth import long_form, main
from recipes.pruning.constructor import constructor_with
from recipes.pruning.export import export
from recipes.pruning.story import latencies, table
from torch_meanfield import convert, fold, prune_depth_
from torch_meanfield.pruning.report import Constructor

TINY = {"patch_size": 1, "depths": [1, 1, 4, 1], "dims": [8, 8, 16, 16], "ls_init_value": 1.0}
QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")
QUICK = ("--size", "8", "--model.kwargs", json.dumps(TINY), "--trainer.log_every_n_steps", "1", *QUIET)
QUICK += ("--data.batch_size", "256", "--trainer.max_epochs", "1", "--prune.images", "64")


@pytest.fixture
def prune(monkeypatch, tmp_path):
    """Run ``recipes/prune_depth.py`` on a tiny network with weights, in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(7)
    torch.save(timm.create_model("convnext_atto", in_chans=1, num_classes=10, **TINY).state_dict(), "plain.pt")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["prune_depth.py", "fit", *map(str, args)])
        return main()

    return run


@pytest.fixture
def refused(prune, capsys):
    """The one line on which the command ends."""

    def run(*args):
        with pytest.raises(SystemExit) as end:
            prune(*args)
        assert end.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("prune_depth.py: error: ")
        return error

    return run


def test_short_forms_are_spelled_out():
    out = long_form("fit --model a --to-latency=0.5 --by cosine --checkpoint f.pt --data cifar10".split())
    assert out[-2:] == ["--model.head_epochs", "0"]
    assert "--prune.to_latency=0.5" in out and out[out.index("--prune.by") + 1] == "cosine"
    assert out[out.index("--model.name") + 1] == "a" and out[out.index("--model.checkpoint") + 1] == "f.pt"
    assert long_form(out) == out
    assert "0" not in long_form("fit --model.head_epochs 2".split())


@pytest.mark.parametrize("plain", [False, True])
def test_a_run_leaves_a_plain_network_of_fewer_blocks_that_classifies_as_it_did(prune, tmp_path, plain, capsys):
    cli = prune("--checkpoint", "plain.pt", "--remove", 2, *QUICK, *["--plain"] * plain)
    folder = tmp_path / "runs" / "digits" / "version_0"
    story = json.loads((folder / "prune.json").read_text())
    assert len(story["removed"]) == 2 and story["blocks"] == 4 and set(story["removed"]) <= set(story["order"])
    assert story["order"][:2] == sorted(story["removed"], key=story["order"].index)
    assert story["parameters"][1] < story["parameters"][0] and len(story["milliseconds"]) == 2
    assert cli.trainer.global_step > 0 and str(tmp_path) not in json.dumps(story)
    assert sum("dwconv" in name or "conv_dw" in name for name, _ in cli.model.net.named_modules()) == 1 + 1 + 2 + 1
    images, labels = next(iter(FinetuneData(size=8).some("test", 64, 64)))
    assert story["file"] == "pruned.pt" and "depths=" in story["made_by"]
    network = eval(story["made_by"], {"timm": timm}).eval()
    network.load_state_dict(torch.load(folder / story["file"], weights_only=True), strict=True)
    cli.model.net.eval()
    with torch.no_grad():
        assert torch.allclose(network(images), cli.model.net(images), rtol=1e-4, atol=1e-4)
        wrong = sum(int((network(x).argmax(1) != y).sum()) for x, y in FinetuneData(size=8).some("test", None, 100))
    assert story["error"] == pytest.approx(100 * wrong / 500, abs=0.21)  # an image whose logits are a tie
    assert (folder / "prune.png").stat().st_size > 10_000 and (folder / "prune.md").read_text() == table(story)
    capsys.readouterr()


def test_an_interrupted_run_goes_on_with_the_blocks_it_had(prune, tmp_path, capsys):
    more = (*QUICK, "--checkpoint", "plain.pt", "--keep", 3, "--by", "cosine")
    first = prune(*more)
    last = next((tmp_path / "runs" / "digits" / "version_0").glob("checkpoints/last*.ckpt"))
    again = prune(*more, "--trainer.max_epochs", 2, "--ckpt_path", last)
    assert again.model.cut == first.model.cut and again.model.report.removed == first.model.report.removed
    assert again.trainer.global_step == 2 * first.trainer.global_step
    assert again.story["error_before"] == first.story["error_before"]
    capsys.readouterr()


def test_bad_input_ends_on_one_line_before_anything_is_written(refused, tmp_path):
    weights = ("--checkpoint", "plain.pt")
    for arguments, told in (
        (weights, "no target: pass one of --remove N, --keep N and --to-latency SHARE"),
        ((*weights, "--remove", 1, "--keep", 2), "--remove and --keep: pass one of"),
        (("--remove", 1), "no weights, so nothing to remove by: pass --checkpoint FILE"),
        ((*weights, "--model.new_head", "true", "--remove", 1), "the classifier is new, so --by greedy"),
        ((*weights, "--remove", 1, "--prune.images", 1), "--prune.images 1"),
        ((*weights, "--remove", 9), "9"),
        ((*weights, "--by", "size", "--remove", 1), "size"),
    ):
        assert told in refused(*QUICK, *arguments), arguments
    assert not list(tmp_path.glob("runs/*/*/*.json"))


@pytest.mark.parametrize(
    "name, side, kwargs, removed, call",
    [
        ("convnext_atto", 8, TINY, ["stages.2.blocks.1"], "depths=[1, 1, 3, 1]"),
        (
            "vit_tiny_patch16_224", 8,
            {"patch_size": 4, "embed_dim": 12, "num_heads": 3, "depth": 4}, ["blocks.0", "blocks.2"], "depth=2",
        ),
        (
            "resnet10t", 32,
            {"layers": [1, 3, 1, 1], "channels": [4, 4, 8, 8], "stem_width": 4}, ["layer2.2"], "layers=[1, 2, 1, 1]",
        ),
    ],
)  # fmt: skip
def test_arguments_of_the_command_line_are_in_the_call_that_makes_the_network(name, side, kwargs, removed, call):
    backbone = Backbone(name, 5, 3, side, kwargs)
    net = convert(backbone.create().eval(), torch.randn(2, 3, side, side))
    report = prune_depth_(net, remove=removed)
    folded = fold(net)
    found = constructor_with(backbone, replace(report, constructor=None), folded).constructor
    assert call in str(found)
    plain = eval(str(found), {"timm": timm}).eval()
    plain.load_state_dict(folded.state_dict(), strict=True)
    x = torch.randn(2, 3, side, side)
    assert torch.allclose(plain(x), net(x), rtol=1e-4, atol=1e-5)
    unknown = Backbone(name, 5, 3, side, {k: v for k, v in kwargs.items() if not call.startswith(k)})
    assert constructor_with(unknown, replace(report, constructor=None), folded).constructor is None


def test_where_no_constructor_is_known_the_network_itself_is_exported(tmp_path):
    torch.manual_seed(0)
    net = convert(CifarResNet((3, 2, 2)).eval(), torch.randn(2, 3, 8, 8))
    report = prune_depth_(net, remove=["layer1.1"])
    assert report.constructor is None
    images = torch.randn(5, 3, 8, 8)
    _, written = export(net, report, images, tmp_path)
    assert written == {"file": "pruned.pt2", "made_by": None, "error": pytest.approx(0, abs=1e-5)}
    network = torch.export.load(tmp_path / "pruned.pt2").module()
    assert torch.allclose(network(images), net(images), rtol=1e-4, atol=1e-5)
    assert torch.allclose(network(images[:3]), net(images[:3]), rtol=1e-4, atol=1e-5)  # batches of any size


def test_what_is_not_the_same_is_not_written(tmp_path, monkeypatch):
    net = convert(CifarResNet((3, 2, 2)).eval(), torch.randn(2, 3, 8, 8))
    report = prune_depth_(net, remove=["layer1.1"])
    wrong = replace(report, constructor=Constructor("CifarResNet((2, 2, 2))", lambda: Doubled((2, 2, 2))))
    with pytest.raises(NotTheSame, match=r"CifarResNet\(\(2, 2, 2\)\) with the folded weights differs"):
        export(net, wrong, torch.randn(2, 3, 8, 8), tmp_path)
    assert not list(tmp_path.iterdir())


class Doubled(CifarResNet):
    """A network of the same entries that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_latencies_are_those_of_the_networks():
    small, large = nn.Linear(8, 8), nn.Sequential(*(nn.Linear(400, 400) for _ in range(30)))
    few = latencies([nn.Sequential(nn.Linear(400, 8), small), large], torch.randn(64, 400), repeats=5)
    assert 0 < few[0] < few[1]
