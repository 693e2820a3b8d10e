"""The pruning command as its users give it: what goes, what a run leaves, resuming, and bad input."""

import json
import sys

import pytest
import timm
import torch
from torch import nn

from recipes.finetune.data import FinetuneData
from recipes.prune_depth import long_form, main
from recipes.pruning.story import latencies, table

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
    if story["made_by"]:
        network = eval(story["made_by"], {"timm": timm})
        network.load_state_dict(torch.load(folder / story["file"], weights_only=True), strict=True)
        network.eval()
    else:
        network = torch.export.load(folder / story["file"]).module()
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


def test_latencies_are_those_of_the_networks():
    small, large = nn.Linear(8, 8), nn.Sequential(*(nn.Linear(400, 400) for _ in range(30)))
    few = latencies([nn.Sequential(nn.Linear(400, 8), small), large], torch.randn(64, 400), repeats=5)
    assert 0 < few[0] < few[1]
