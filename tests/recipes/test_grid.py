"""Many runs, several at once: none done twice, none lost. A small script stands for the training, the rest is real."""

import errno
import json
import os
import signal
import textwrap
import threading
import time

import pytest
import torch

from recipes.errors import BadInput
from recipes.grids import grid
from recipes.grids.grid import Failed, Job, Place, carry_out, one_line_endings

TRAINING = """
    import json, os, sys, time
    from pathlib import Path
    args = sys.argv[1:]
    root = Path(args[args.index("--trainer.default_root_dir") + 1])
    if "--fall" in args:
        sys.exit("recipe: error: it fell")
    busy = root.parent / "busy"
    busy.mkdir(exist_ok=True)
    me = busy / root.name
    me.touch()
    (root.parent / "log.txt").open("a").write(f"{len(list(busy.iterdir()))} {' '.join(args)}\\n")
    if "--greedy" in args and len(list(busy.iterdir())) > 1:
        me.unlink()
        sys.exit("torch.OutOfMemoryError: CUDA out of memory.")
    time.sleep(1.0)
    me.unlink()
    version = root / "data" / f"version_{len(list(root.glob('data/version_*')))}"
    version.mkdir(parents=True)
    epochs = [{"epoch": 0, "val_error": 12.5}]
    for name in ("curve.json", "run.json"):
        (version / name).write_text(json.dumps({"epochs": epochs, "seconds": 1.0, "args": args}))
"""


@pytest.fixture
def script(monkeypatch, tmp_path):
    """A training of a second, in the place of recipes/cifar.py."""
    path = tmp_path / "training.py"
    path.write_text(textwrap.dedent(TRAINING))
    monkeypatch.setattr(grid, "SCRIPT", str(path))
    monkeypatch.setattr(grid, "POLL", 0.05)
    return path


def jobs(*names, args=()):
    return [Job(name, "digits.yaml", ("--seed_everything", name, *args), 1) for name in names]


def started(folder):
    return [line.split(maxsplit=1) for line in (folder / "log.txt").read_text().splitlines()]


def test_runs_go_side_by_side_and_are_done_once(script, tmp_path):
    seen = []
    records = carry_out(jobs("a", "b", "c"), tmp_path / "out", 2, finished=lambda done: seen.append(sorted(done)))
    assert sorted(records) == ["a", "b", "c"]
    assert records["b"]["epochs"][-1]["val_error"] == 12.5
    assert "--config recipes/configs/digits.yaml --seed_everything b" in records["b"]["command"]
    assert max(int(n) for n, _ in started(tmp_path / "out")) == 2
    assert [len(each) for each in seen] == [1, 2, 3]
    assert carry_out(jobs("a", "b", "c"), tmp_path / "out", 2) == records
    assert len(started(tmp_path / "out")) == 3


def test_out_of_memory_means_fewer_at_once(script, tmp_path):
    records = carry_out(jobs("a", "b", args=("--greedy",)), tmp_path / "out", 2)
    assert sorted(records) == ["a", "b"]
    assert [n for n, _ in started(tmp_path / "out")].count("1") == 2  # one after the other, in the end


def test_a_failure_is_quoted_and_the_others_are_done(script, tmp_path):
    bad = Job("bad", "digits.yaml", ("--fall",), 1)
    with pytest.raises(Failed, match=r"bad: recipe: error: it fell \(all of it in .*log.txt\)"):
        carry_out([bad, *jobs("a")], tmp_path / "out", 1)
    assert (tmp_path / "out" / "a.json").exists()
    assert not (tmp_path / "out" / "bad.json").exists()


def test_a_folder_of_another_configuration_is_refused_before_anything_starts(script, tmp_path):
    carry_out(jobs("a"), tmp_path / "out", 1)
    with pytest.raises(BadInput, match=r"a\.json is of another configuration .*--seed_everything a.* pass another"):
        carry_out(jobs("b", "a", args=("--model.lr", "1")), tmp_path / "out", 1)
    assert len(started(tmp_path / "out")) == 1


def test_what_another_process_trains_is_waited_for_and_taken_over(script, tmp_path):
    """A script that is killed leaves its trainings alone; their locks are their own."""
    (job,), out = jobs("a"), tmp_path / "out"
    place = Place(job, out)
    lock = grid._locked(place)
    assert grid._locked(place) is None

    def finish():
        time.sleep(0.5)
        version = place.pieces / "data" / "version_0"
        version.mkdir(parents=True)
        (version / "run.json").write_text(json.dumps({"epochs": [{"epoch": 0, "val_error": 1.0}], "seconds": 1.0}))
        lock.close()

    other = threading.Thread(target=finish)
    other.start()
    records = carry_out([job], out, 1)
    other.join()
    assert records["a"]["epochs"][-1]["val_error"] == 1.0
    assert not (out / "log.txt").exists()  # no training was started


def test_a_torn_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    place = Place(jobs("a")[0], tmp_path)
    assert place.checkpoint() is None
    paths = []
    for version in (9, 10, 11):
        folder = place.pieces / "data" / f"version_{version}" / "checkpoints"
        folder.mkdir(parents=True)
        torch.save({"state_dict": {"w": torch.ones(100)}}, folder / "last.ckpt")
        paths.append(folder / "last.ckpt")
    assert place.checkpoint() == paths[2]
    paths[2].write_bytes(paths[2].read_bytes()[:200])
    with pytest.warns(UserWarning, match="version_11.*is not whole"):
        assert place.checkpoint() == paths[1]


def test_an_interrupted_run_goes_on_from_its_checkpoint(script, tmp_path):
    (job,), out = jobs("a"), tmp_path / "out"
    folder = Place(job, out).pieces / "data" / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({"state_dict": {}}, folder / "last.ckpt")
    args = carry_out([job], out, 1)["a"]["args"]
    assert args[args.index("--ckpt_path") + 1] == str(folder / "last.ckpt")


@pytest.fixture
def listening():
    """SIGINT raises KeyboardInterrupt; a shell that starts the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interruption_ends_the_trainings(script, tmp_path, listening):
    text = script.read_text().replace("time.sleep(1.0)", "time.sleep(60)")
    script.write_text(text)
    begun = threading.Timer(2.0, lambda: os.kill(os.getpid(), signal.SIGINT))
    begun.start()
    with pytest.raises(KeyboardInterrupt):
        carry_out(jobs("a"), tmp_path / "out", 1)
    lock = grid._locked(Place(jobs("a")[0], tmp_path / "out"))
    assert lock is not None  # nobody holds it any more
    lock.close()


def test_each_run_sees_one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [grid._one_gpu(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "7", "4"]
    assert grid.at_once_by_default() == 6
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert grid._one_gpu(0) == {}
    assert grid.at_once_by_default() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (BadInput("--seeds 0: pass at least 1"), 2, "it.py: error: --seeds 0: pass at least 1"),
        (Failed("a: it fell"), 1, "it.py: error: a: it fell"),
        (KeyboardInterrupt(), 130, "it.py: interrupted; the same command goes on from here"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "it.py: error: no room on the disk"),
    ],
)
def test_what_ends_a_grid_early_is_one_line(capsys, error, code, line):
    with pytest.raises(SystemExit) as ended, one_line_endings("it.py"):
        raise error
    told = capsys.readouterr().err.splitlines()
    assert (ended.value.code, len(told)) == (code, 1)
    assert told[0].startswith(line)


def test_other_errors_of_the_system_keep_their_traceback():
    with pytest.raises(PermissionError), one_line_endings("it.py"):
        raise PermissionError("not yours")
