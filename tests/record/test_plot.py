"""The picture: a panel for each layer, a line for each particle, a tick for each re-sort."""

import pytest
import torch

from torch_meanfield.record import Trajectory, plot_tau


def _crossing():
    trajectory = Trajectory(2)
    trajectory.record(0, torch.tensor([1.0, 2.0]))
    trajectory.move(torch.tensor([1, 0]), resorted_at=1)
    trajectory.record(1, torch.tensor([1.5, 1.75]))
    return trajectory


def test_lines_are_particles_and_ticks_are_re_sorts():
    figure = plot_tau({"first": _crossing(), "second": _crossing()}, title="a title", details="details")
    first, second = figure.axes
    assert [line.get_ydata().tolist() for line in first.lines] == [[1.0, 1.75], [2.0, 1.5]]
    assert [line.get_xdata().tolist() for line in first.lines] == [[0, 1], [0, 1]]
    assert first.get_title() == "first: 2 particles, 1 re-sort"
    assert second.get_title() == "second: 2 particles, 1 re-sort"
    (ticks,) = first.collections
    assert [segment[:, 0].tolist() for segment in ticks.get_segments()] == [[1.0, 1.0]]
    assert figure.get_suptitle() == "a title"
    assert figure.get_supxlabel() == "details"


def test_step_sizes_are_drawn_by_place_in_time():
    figure = plot_tau({f"layer {i}": _crossing() for i in range(4)}, steps=True)
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert len(shown) == 8 and len(figure.axes) == 12
    titled = [ax.get_title().split(":")[0] for ax in shown]
    assert titled == ["layer 0", "layer 1", "layer 2", "", "", "", "layer 3", ""]
    for ax in shown[3:6]:
        assert [line.get_ydata().tolist() for line in ax.lines] == [[1.0, 1.5], [1.0, 0.25]]


@pytest.mark.parametrize(("layers", "visible", "places"), [(1, 1, 1), (3, 3, 3), (4, 4, 6)])
def test_panels_are_wrapped(layers, visible, places, tmp_path):
    figure = plot_tau({f"layer {i}": _crossing() for i in range(layers)})
    assert sum(ax.get_visible() for ax in figure.axes) == visible
    assert len(figure.axes) == places
    figure.savefig(tmp_path / "tau.png")
    assert (tmp_path / "tau.png").stat().st_size > 1000


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="trajectories is empty"):
        plot_tau({})
    with pytest.raises(ValueError, match="'bare' holds no record"):
        plot_tau({"bare": Trajectory(2)})
