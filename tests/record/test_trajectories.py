"""Following particles by identity, against particles that carry their own names."""

import pickle

import pytest
import torch

from torch_meanfield.record import Trajectory


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


def test_forces_are_kept_by_particle_and_a_checkpoint_without_them_is_read():
    trajectory = Trajectory(3)
    trajectory.move(torch.tensor([2, 0, 1]))
    assert trajectory.by_particle([10.0, 20.0, 30.0]) == [20.0, 30.0, 10.0]
    trajectory.record(0, torch.tensor([1.0, 2.0, 3.0]))
    trajectory.record(1, torch.tensor([1.0, 2.0, 3.0]), [4.0, 5.0, 6.0], [7.0, 8.0, 9.0])
    state = trajectory.state_dict()
    assert (state["grad"], state["potential"]) == ([None, [4.0, 5.0, 6.0]], [None, [7.0, 8.0, 9.0]])
    assert Trajectory.from_state_dict(state).state_dict() == state
    del state["grad"], state["potential"]
    assert Trajectory.from_state_dict(state).grad == Trajectory.from_state_dict(state).potential == [None, None]


def test_a_clone_goes_on_as_a_particle_that_died():
    trajectory = Trajectory(5)
    trajectory.move(torch.tensor([1, 0, 2, 3, 4]))
    trajectory.move(torch.tensor([0, 0, 3, 3, 3]))  # slots 1, 2 and 4 die: particles 0, 2 and 4
    assert trajectory.who == [1, 0, 3, 2, 4]
    trajectory.record(1, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]))
    assert trajectory.tau == [pytest.approx([0.2, 0.1, 0.4, 0.3, 0.5])]
    assert trajectory.resorts == []
