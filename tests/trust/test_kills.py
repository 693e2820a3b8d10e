"""Killed with SIGKILL at random points, also inside the write of a checkpoint: the end is that of the whole run."""

import os
import sys
import zipfile

import pytest
import torch

from tools.faults.kills import FORMS, Death, killed_and_resumed, random_deaths, run
from torch_meanfield.lightning import newest_checkpoint

STEPS = 40  # five epochs
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and fork servers are POSIX")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was not killed, by form."""
    made = {}

    def of(form):
        if form not in made:
            made[form] = tmp_path_factory.mktemp("whole")
            assert run(form, made[form], STEPS, Death())
        return made[form]

    return of


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [0, 2])  # forward and stepped, then writing and torn
def test_the_end_is_that_of_the_whole_run(tmp_path, whole, form, seed):
    outcome = killed_and_resumed(form, tmp_path, STEPS, random_deaths(seed, STEPS, 2), whole(form))
    assert outcome.kills == 2
    assert outcome.differences == []


def test_the_training_that_is_killed_moves_everything(whole):
    ending = torch.load(whole("Lightning") / "ending.pt", weights_only=True)
    trajectory = ending["trajectories"]["net.stack"]
    assert len(trajectory["resorts"]) >= 5 and trajectory["who"] != sorted(trajectory["who"])
    assert ending["optimizer"]["birth_death"]["clock"] == STEPS
    assert ending["average"]["n_averaged"] == STEPS
    assert len(ending["metrics"]) == STEPS // 8


def test_the_newest_checkpoint_that_is_whole(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None
    for i, name in enumerate("abc"):
        torch.save({"state_dict": {"w": torch.full((1000,), float(i))}}, tmp_path / f"{name}.ckpt")
        times = (tmp_path / f"{name}.ckpt").stat()
        os.utime(tmp_path / f"{name}.ckpt", ns=(times.st_atime_ns, 10**18 + i * 10**9))
    (tmp_path / "d.ckpt.partial").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) == tmp_path / "c.ckpt"
    content = (tmp_path / "c.ckpt").read_bytes()
    for torn in (content[: len(content) // 2], b"", _with_a_flipped_bit(tmp_path / "c.ckpt", content)):
        (tmp_path / "c.ckpt").write_bytes(torn)
        with pytest.warns(UserWarning, match=r"c\.ckpt is not whole \("):
            assert newest_checkpoint(tmp_path) == tmp_path / "b.ckpt"
    assert newest_checkpoint(tmp_path, "a*") == tmp_path / "a.ckpt"


def test_of_two_checkpoints_at_one_time_the_one_of_the_later_step(tmp_path):
    for name in ("step=9", "step=10", "step=1"):
        torch.save({}, tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", ns=(0, 10**18))
    assert newest_checkpoint(tmp_path) == tmp_path / "step=10.ckpt"


def _with_a_flipped_bit(path, content):
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    at = largest.header_offset + 500
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
