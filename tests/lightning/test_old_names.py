"""What a user of version 0.1 imported from ``torch_meanfield.lightning`` is still there."""

import importlib

import pytest

from torch_meanfield import lightning, record

OLD = {
    "ends": "place",
    "exact_resume": "ExactResume",
    "generators": "collect",
    "means": "sums",
    "newest": "newest_checkpoint",
    "own_buffers": "restore_",
    "plain_names": "name_plainly_",
    "plot": "plot_tau",
    "plot_births": "plot_births",
    "replay": "Replay",
    "trajectories": "Trajectory",
    "turnover": "Turnover",
}


@pytest.mark.parametrize("module", OLD)
def test_a_moved_module_is_found_under_its_old_name(module):
    assert hasattr(importlib.import_module(f"torch_meanfield.lightning.{module}"), OLD[module])


def test_names_are_those_of_the_records():
    assert lightning.Turnover is record.BirthRecord
    assert lightning.Trajectory is record.Trajectory
    assert callable(lightning.plot_births) and callable(lightning.plot_tau)
