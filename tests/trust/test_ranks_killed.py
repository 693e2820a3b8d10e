"""Both ranks of a Lightning training killed with SIGKILL and resumed: each ends as if nothing had happened."""

import sys

import pytest
import torch.distributed as dist

from tools.faults.digits import differences
from tools.faults.kills import Death
from tools.faults.ranks import FSDP_ON_CPU
from tools.faults.ranks_killed import ending, killed_and_resumed, run

EPOCHS = 2
pytestmark = pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs gloo and SIGKILL")


@pytest.mark.parametrize(
    "strategy",
    ["DDP", pytest.param("FSDP2", marks=pytest.mark.skipif(not FSDP_ON_CPU, reason="runs on the CPU from 2.7 on"))],
)
def test_each_rank_ends_as_if_it_had_not_been_killed(tmp_path, strategy):
    whole = tmp_path / "whole"
    assert run(strategy, whole, EPOCHS, Death())
    first, second = ending(whole, 0), ending(whole, 1)
    # what a resumed rank must not take from the other: generators, and what is only sent around by DDP
    assert differences(first["generator"], second["generator"])
    assert (strategy == "FSDP2") is bool(differences(first["buffers"], second["buffers"]))
    assert differences(first["parameters"], second["parameters"]) == []
    assert differences(first["optimizer"], second["optimizer"]) == []
    # from the checkpoint after step 9, one step after an event
    outcome = killed_and_resumed(strategy, tmp_path / "killed", EPOCHS, [Death(10, "stepped")], whole)
    assert outcome.kills == 1 and outcome.differences == []
