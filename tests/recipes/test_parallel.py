"""The command on two CPU processes over gloo: DDP and FSDP2 make the same re-sorts and births on both ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
# Before 2.7 the FSDP2 of torch ran its collectives on accelerator streams only.
FSDP_ON_CPU = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 7)
# Blocks that cross at once, and units that are replaced every few steps.
OPTIONS = {
    "trainer.accelerator": "cpu",
    "trainer.devices": 2,
    "trainer.max_epochs": 2,
    "trainer.limit_val_batches": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
    "data.batch_size": 64,
    "model.depth": 20,
    "model.horizon": 1,
    "model.lr": 0.02,
    "model.tau_lr_scale": 300,
    "model.birth_death": "true",
    "model.birth_death_every": 4,
}

pytestmark = pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs gloo")


def _run(tmp_path, strategy, *more):
    out = tmp_path / "ranks"
    out.mkdir()
    words = [f"--{option}={value}" for option, value in {**OPTIONS, "trainer.strategy": strategy}.items()]
    dump = ["--trainer.callbacks+=state_dump.StateDump", f"--trainer.callbacks.folder={out}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "cifar.py"), "fit", *words, *dump, *more],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done, out


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("ddp", "DDPStrategy"),
        pytest.param(
            "fsdp2",
            "FSDP2Strategy",
            marks=pytest.mark.skipif(not FSDP_ON_CPU, reason="FSDP2 runs on the CPU from torch 2.7 on"),
        ),
    ],
)
def test_both_ranks_end_alike_bit_for_bit(tmp_path, strategy, kind):
    done, out = _run(tmp_path, strategy)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (torch.load(out / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert ours["strategy"] == theirs["strategy"] == kind
    assert ours["motions"] == theirs["motions"]
    causes = [cause for cause, _ in ours["motions"]]
    assert causes.count("resort") >= 2 and causes.count("birth_death") >= 1
    assert ours["born"] == theirs["born"] > 20
    assert set(ours["sharded"]) == (set(ours["parameters"]) if strategy == "fsdp2" else set())
    # the first rank's running statistics are sent to all, by DDP and, under FSDP2, by the recipe
    for group in ("parameters", "optimizer", "buffers"):
        assert ours[group].keys() == theirs[group].keys() and len(ours[group]) > 50
        for name, value in ours[group].items():
            assert torch.equal(value, theirs[group][name]), (group, name)
    assert any("tau_axis.offset" in name for name in ours["parameters"])
    # Not because they did the same work: each had its own half of the images.
    assert len(ours["seen"]) == len(theirs["seen"]) and not torch.equal(ours["seen"], theirs["seen"])

    folder = tmp_path / "runs" / "digits" / "version_0"
    run = json.loads((folder / "run.json").read_text())
    assert run["born"] == ours["born"] and run["resorts"] == causes.count("resort")
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    for name, value in ours["parameters"].items():
        assert torch.equal(value, checkpoint["state_dict"][name]), name


def test_fsdp1_is_refused_with_the_reason(tmp_path):
    done, _ = _run(tmp_path, "fsdp")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "cifar.py: error: --trainer.strategy fsdp: FSDP1 flattens parameters, so that blocks and units cannot be told "
        "apart to move them; pass fsdp2"
    ]
    assert not (tmp_path / "runs").exists()
