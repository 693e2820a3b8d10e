"""The benchmarks of the recipes at toy size: what they time is what they say, and nothing is made up."""

import json
import sys
import time

import pytest
import torch

from benchmarks import gpu, importing, lightning_overhead, loader
from benchmarks.timing import compared, in_turns, table
from recipes.images.augment import crop_padding
from recipes.images.source import Images
from recipes.images.sources import open_source


def test_both_loaders_hand_out_the_same_images_normalised_alike():
    images = open_source("digits", None).decode("train").select(torch.arange(300))
    ours, theirs = loader.loaders(images, False, 64, torch.device("cpu"), 0)
    assert len(ours) == len(theirs) == 5
    seen = []
    for batches in (ours, theirs):
        pixels, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert sorted(labels.tolist()) == sorted(images.labels.tolist())
        seen.append(pixels)
    assert seen[0].shape == seen[1].shape == images.pixels.shape and seen[0].dtype == seen[1].dtype
    # Each image is cropped anew on both sides, so only means over all of them agree.
    torch.testing.assert_close(seen[0].mean(0), seen[1].mean(0), rtol=0, atol=0.3)
    assert crop_padding(8) == 1 and not torch.equal(seen[0], seen[1])


def test_contenders_take_turns_and_the_ratio_is_of_neighbours():
    now, calls = [0.0], []

    def runs(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds * len(calls)  # a machine that becomes slower

        return run

    seconds = in_turns({"a": runs("a", 2.0), "b": runs("b", 1.0)}, 4, lambda: now[0])
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b", "b", "a"]
    assert seconds["a"] == [6.0, 12.0, 14.0, 20.0]
    figure = compared(seconds, "a", "b")
    assert figure["ratio"] == pytest.approx((14 / 8 + 20 / 9) / 2)
    assert table(("x", "y"), [(1, 2)]) == "| x | y |\n| --- | --- |\n| 1 | 2 |"


def _gpu(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, args)])
    gpu.main()
    return capsys.readouterr().out


def test_a_rehearsal_runs_the_parts_and_says_that_it_is_one(monkeypatch, capsys, tmp_path):
    out = tmp_path / "rehearsal.json"
    text = _gpu(
        monkeypatch, capsys, "--device", "cpu", "--tiny", "--parts", "epochs,steps,compiled,memory,loader", "--out", out
    )
    result = json.loads(out.read_text())
    figures = result["figures"]
    assert list(figures) == list(gpu.FIGURES)
    assert result["rehearsal"] and text.startswith("Rehearsal at toy size")
    assert (tmp_path / "rehearsal.md").read_text() in text
    for key in ("epoch", "eager", "compiled", "loader"):
        assert figures[key]["value"] > 0 and figures[key]["reason"] is None
    assert set(figures["epoch"]["detail"]["seconds"]) == {"eager", "eager, channels_last", "compiled, channels_last"}
    assert figures["memory"]["value"] is None
    assert "| not measured: peak memory is counted on CUDA alone | – |" in text
    assert figures["table"]["reason"] == "left out by --parts"


def test_a_part_that_fails_is_told_and_the_others_go_on(monkeypatch, capsys, tmp_path):
    def broken(setting):
        raise RuntimeError("no room\nfor this")

    def late(setting):
        setting.ends = 0.0
        return {"eager": (1.5, {})}

    parts = {"epochs": (("epoch",), broken), "steps": (("eager",), late), "loader": (("loader",), late)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    arguments = ("--device", "cpu", "--tiny", "--parts", "epochs,steps,loader", "--out", tmp_path / "out.json")
    _gpu(monkeypatch, capsys, *arguments)
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert figures["epoch"]["reason"] == "failed: RuntimeError: no room for this"
    assert (figures["epoch"]["value"], figures["eager"]["value"]) == (None, 1.5)
    assert figures["loader"]["reason"] == "the time was up"


def test_scripts_of_the_recipes_are_started_and_their_failures_named(monkeypatch, capsys, tmp_path):
    started = []

    def run(setting, *command):
        started.append(command)
        if command[0].startswith("recipes"):
            return ""
        out = command[command.index("--out") + 1]
        with open(out, "w") as file:
            json.dump({"ratio": 1.25, "seconds": 1, "quartiles": [1, 2], "repeats": 1, "batches": 2}, file)
        return ""

    arguments = ("--device", "cpu", "--tiny", "--parts", "table,lightning", "--out", tmp_path / "out.json")
    _gpu(monkeypatch, capsys, *arguments)
    reasons = [f["reason"] for f in json.loads((tmp_path / "out.json").read_text())["figures"].values()]
    assert reasons.count("starts the recipes, which need --data") == 2
    with monkeypatch.context() as patch:
        patch.setattr(gpu.Setting, "run", run)
        _gpu(patch, capsys, *arguments, "--data", "digits")
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert figures["lightning"]["value"] == 1.25
    assert [c[c.index("--jobs") + 1] for c in started[:2]] == ["1", "3"]
    assert set(figures["table"]["detail"]["seconds"]) == {"2 runs, 1 at once", "2 runs, 3 at once"}
    images = Images(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    setting = gpu.Setting(torch.device("cpu"), True, images, None, ends=time.monotonic() + 300)
    with pytest.raises(gpu.NotMeasured, match=r"recipes/table.py ended with exit code 2: table.py: error: --rows none"):
        setting.run("recipes/table.py", "--rows", "none")
    setting.ends = 0.0
    with pytest.raises(gpu.NotMeasured, match=r"-c took more than the 1 s that were left"):
        setting.run("-c", "import time; time.sleep(100)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "no CUDA device here, nothing measured"),
        (("--device", "cpu"), "--device cpu is for a rehearsal"),
        (("--device", "cpu", "--tiny", "--parts", "all"), "--parts all: unknown; accepted: epochs, steps"),
        (("--device", "cpu", "--tiny", "--data", "none"), "--data 'none' is unknown"),
    ],
)
def test_without_a_gpu_or_with_bad_arguments_nothing_is_written(args, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *args, "--out", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"gpu.py: error: {message}") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_the_twin_of_the_recipe_is_trained_alike(monkeypatch, capsys, tmp_path):
    out, seen = tmp_path / "out.json", []
    monkeypatch.setattr(
        lightning_overhead.BareTwin,
        "on_fit_end",
        lambda self, trainer, module: seen.append((self, trainer)),
        raising=False,
    )
    size = ["--depth", "8", "--batches", "3", "--repeats", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["lightning_overhead.py", "--data", "digits", "--device", "cpu", *size])
    threads = torch.get_num_threads()
    try:
        lightning_overhead.main()
    finally:
        torch.set_num_threads(threads)
    ((twin, trainer),) = seen
    result = json.loads(out.read_text())
    assert result["ratio"] > 0 and result["repeats"] == 2 and result["batches"] == 3
    assert len(twin.seconds["Lightning"]) == len(twin.seconds["bare loop"]) == 2
    # As many steps on both sides.
    momentum = [o.state[next(iter(o.state))]["momentum_buffer"] for o in (twin.optimizer, *trainer.optimizers)]
    assert trainer.global_step == 9 and all(bool(m.any()) for m in momentum)
    assert twin.net is not trainer.lightning_module.net
    assert not list(tmp_path.rglob("version_0"))  # what the run wrote is gone


def test_imports_are_timed_in_processes_of_their_own(monkeypatch, capsys, tmp_path):
    out = tmp_path / "importing.json"
    command = ["importing.py", "--repeats", "1", "--modules", "torch_meanfield", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    importing.main()
    row = json.loads(out.read_text())["rows"]["torch_meanfield"]
    assert "torch_meanfield" in capsys.readouterr().out
    assert 0 < row["seconds"] < row["seconds_before"]
