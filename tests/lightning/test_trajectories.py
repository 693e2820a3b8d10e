"""Following particles by identity, against particles that carry their own names."""

import pickle

import pytest
import torch

from torch_meanfield.lightning import Trajectory


def test_positions_follow_the_particle_through_any_sequence_of_motions():
    generator = torch.Generator().manual_seed(0)
    names, trajectory, expected = torch.arange(6), Trajectory(6), []
    for step in range(20):
        tau = torch.rand(6, generator=generator)  # by slot
        trajectory.record(step, tau)
        by_name = torch.empty(6)
        by_name[names] = tau
        expected.append(by_name.tolist())
        index = torch.randperm(6, generator=generator)
        trajectory.move(index, resorted_at=step + 1 if step % 2 else None)
        names = names[index]  # new[i] = old[index[i]]
    assert trajectory.tau == expected
    assert trajectory.who == names.tolist()
    assert trajectory.steps == list(range(20))
    assert trajectory.resorts == list(range(2, 21, 2))


def test_a_step_is_recorded_once():
    trajectory = Trajectory(2)
    trajectory.record(5, torch.tensor([1.0, 2.0]))
    trajectory.record(5, torch.tensor([3.0, 4.0]))
    trajectory.record(4, torch.tensor([3.0, 4.0]))
    assert (trajectory.steps, trajectory.tau) == ([5], [[1.0, 2.0]])


def test_the_state_is_plain_and_complete():
    trajectory = Trajectory(3)
    trajectory.record(0, torch.tensor([1.0, 2.0, 3.0]))
    trajectory.move(torch.tensor([2, 0, 1]), resorted_at=1)
    state = pickle.loads(pickle.dumps(trajectory.state_dict()))
    again = Trajectory.from_state_dict(state)
    again.record(1, torch.tensor([1.0, 2.0, 3.0]))
    trajectory.record(1, torch.tensor([1.0, 2.0, 3.0]))
    assert again.state_dict() == trajectory.state_dict()
    assert state["steps"] == [0]  # a snapshot, not a view
    assert again.tau[1] == pytest.approx([2.0, 3.0, 1.0])
