"""The command line: what it prints, its exit codes, and that every error is one line that names the way out."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import torch_meanfield
from torch_meanfield import conversion_report, convert, depth_scores, find_populations, fold, prune_depth_
from torch_meanfield.command_line import main
from torch_meanfield.convert.small_network import residual_network
from torch_meanfield.theory import diagnose

NET = "torch_meanfield.convert.small_network:residual_network"
FACTORIES = """
import torch
from torch import nn

def linear(): return nn.Linear(3, 2)
def pair(): return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(1, 3)
def tokens(): return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2)), torch.zeros(1, 5, dtype=torch.long)
def nothing(): return 3
def broken(): raise KeyError("width")
module = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
"""


@pytest.fixture
def here(monkeypatch, tmp_path):
    (tmp_path / "factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("factories", None)


def document(capsys, *args):
    assert main([*args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def complaint(capsys, *args):
    code, caught = main(list(args)), capsys.readouterr()
    assert caught.out == "" and caught.err.count("\n") == 1 and "Traceback" not in caught.err
    return code, caught.err


def test_the_report_is_what_the_library_finds(capsys):
    told = document(capsys, "report", NET, "--input", "2,4")
    assert told["stages"]["found"][0]["particles"] == [["blocks.0"], ["blocks.1"], ["blocks.2"]]
    found = find_populations(residual_network(), torch.randn(2, 4))
    assert [p["name"] for p in told["populations"]["found"]] == [p.name for p in found]
    assert [r["name"] for r in told["populations"]["refused"]] == [r.name for r in found.refused]
    assert main(["report", NET, "--input", "2,4"]) == 0
    assert "3 particles, blocks.0 to blocks.2" in capsys.readouterr().out


def test_the_report_of_a_model_without_residual_blocks_has_the_reason_and_the_populations(here, capsys):
    told = document(capsys, "report", "factories:pair")
    assert "no residual blocks" in told["stages"]["error"]
    assert [p["units"] for p in told["populations"]["found"]] == [8]


def test_a_name_of_timm_knows_its_input(capsys):
    pytest.importorskip("timm")
    told = document(capsys, "report", "meanfield_resnet20", "--input", "1,3,8,8")
    assert told["model"] == "MeanFieldResNet" and told["populations"]["found"]


def test_the_diagnosis_is_that_of_the_library(here, capsys):
    told = document(capsys, "diagnose", NET, "--input", "2,4", "--batch", "6")
    expected = diagnose(residual_network(), torch.randn(6, 4))
    assert [layer["name"] for layer in told["layers"]] == [layer.name for layer in expected.layers]
    assert told["batch"] == 6 and all(value > -1e-6 for value in told["kernel"]["eigenvalues"])
    assert main(["diagnose", "factories:tokens", "--batch", "4"]) == 0
    assert "on 4 inputs" in capsys.readouterr().out


def test_fold_writes_what_plain_code_would(here, capsys):
    model = convert(residual_network(), torch.randn(2, 4))
    conversion_report(model).stages[0].module.set_tau_([0.5, 1.5, 4.0])
    torch.save({"state_dict": model.state_dict()}, "trained.pt")
    told = document(capsys, "fold", NET, "--input", "2,4", "--checkpoint", "trained.pt", "--out", "plain.pt")
    assert told["relative_error"] < 1e-5
    assert next(iter(told["steps"].values())) == pytest.approx([0.5, 1.0, 2.5])
    plain, x = residual_network(), torch.randn(5, 4)
    plain.load_state_dict(torch.load("plain.pt", weights_only=True))
    assert torch.allclose(plain.eval()(x), model.eval()(x), atol=1e-5)


def test_prune_writes_the_weights_of_the_shorter_network(here, capsys):
    torch.manual_seed(0)
    trained = residual_network()
    torch.save(trained.state_dict(), "trained.pt")
    data = torch.randn(32, 4), torch.randint(2, (32,))
    torch.save(data, "data.pt")
    prune = ("prune", NET, "--checkpoint", "trained.pt", "--data", "data.pt", "--remove", "1", "--by", "cosine")
    told = document(capsys, *prune, "--batch", "16", "--out", "pruned.pt")
    batches = [(x, y) for x, y in zip(data[0].split(16), data[1].split(16), strict=True)]
    scores = depth_scores(trained, batches, by="cosine", progress=False)
    assert told["scores"] == pytest.approx(dict(scores)) and told["removed"] == list(scores.order[:1])
    prune_depth_(trained, remove=1, scores=scores, batches=batches)
    expected, written = fold(trained).state_dict(), torch.load("pruned.pt", weights_only=True)
    assert written.keys() == expected.keys() and all(torch.equal(written[k], expected[k]) for k in expected)
    assert complaint(capsys, *prune, "--out", "no/where.pt")[0] == 2
    assert complaint(capsys, "prune", NET, "--data", "trained.pt", "--remove", "1", "--out", "o.pt")[0] == 2
    assert complaint(capsys, "prune", NET, "--data", "data.pt", "--remove", "9", "--out", "o.pt")[0] == 1
    assert not (here / "o.pt").exists()


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ((), 2, "--help"),
        (("report",), 2, "MODEL"),
        (("report", "factories:nothing"), 2, "no torch.nn.Module"),
        (("report", "factories:broken"), 2, "KeyError"),
        (("report", "factories:absent"), 2, "module:factory"),
        (("report", "nowhere:absent"), 2, "module:factory"),
        (("report", "factories:module"), 2, "--input"),
        (("report", NET, "--input", "2,x"), 2, "--input"),
        (("report", NET, "--input", "2,5"), 1, "example_input"),
        (("report", "factories:linear", "--input", "2,3"), 1, "no residual blocks"),
        (("diagnose", NET, "--input", "2,4", "--batch", "1"), 2, "at least two"),
        (("diagnose", NET, "--input", "2,4", "--checkpoint", "absent.pt"), 2, "absent.pt"),
        (("diagnose", NET, "--pretrained"), 2, "--pretrained"),
        (("diagnose", NET, "--input", "2,5"), 1, "RuntimeError"),
        (("prune", NET, "--data", "absent.pt", "--remove", "1", "--out", "o.pt"), 2, "no such file"),
        (("prune", NET, "--data", "factories.py", "--remove", "1", "--out", "o.pt"), 2, "plain types alone"),
        (("fold", NET, "--input", "2,4", "--checkpoint", "other.pt", "--out", "o.pt"), 1, "other.pt"),
        (("fold", NET, "--input", "2,4", "--checkpoint", "factories.py", "--out", "o.pt"), 2, "factories.py"),
        (("fold", "factories:pair", "--checkpoint", "other.pt", "--out", "o.pt"), 1, "no residual blocks"),
    ],
)
def test_an_error_is_one_line_with_the_way_out(here, capsys, args, code, words):
    torch.save(nn.Linear(2, 2).state_dict(), "other.pt")
    got, line = complaint(capsys, *args)
    assert got == code and words in line
    assert not (here / "o.pt").exists()


def test_an_unknown_name_of_timm_is_answered_with_its_neighbours(capsys):
    pytest.importorskip("timm")
    assert "did you mean resnet18" in complaint(capsys, "report", "resnet1")[1]


def test_a_tag_of_weights_that_timm_does_not_have_is_one_line(capsys):
    pytest.importorskip("timm")
    code, line = complaint(capsys, "report", "resnet18.no_such_weights")
    assert code == 2 and "no_such_weights" in line


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m torch_meanfield report {NET} --input 2,4 | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_timm_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    code, line = complaint(capsys, "report", "resnet18")
    assert code == 2 and "pip install 'torch-meanfield[timm]'" in line


def test_python_m(here):
    run = [sys.executable, "-m", "torch_meanfield"]
    version = subprocess.run([*run, "--version"], capture_output=True, text=True)
    assert version.stdout == f"torch-meanfield {torch_meanfield.__version__}\n"
    wrong = subprocess.run([*run, "report", "nowhere:absent"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("torch-meanfield: error: ")
