"""The picture of a mean-field network in training: the times of its particles, one panel for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

from torch_meanfield.record.figures import colours, new_figure, over_steps
from torch_meanfield.record.trajectories import Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS_IN_A_ROW = 3


def plot_tau(
    trajectories: Mapping[str, Trajectory],
    title: str | None = None,
    details: str | None = None,
    steps: bool = False,
) -> Figure:
    """Draw the position of every particle over the optimizer steps, each followed through the re-sorts.

    A line keeps its particle, and its colour the place where that particle started (dark: early, light: late), so
    lines that cross are particles that changed places. The ticks at the foot of a panel are the re-sorts.

    Args:
        trajectories: the trajectories by layer name, in the order of the panels.
        title: text in large print above the panels.
        details: text in small print below them: data set, seed, versions.
        steps: whether to draw, in a second panel for each layer below the first, the step sizes: one line for each
            place in time, whichever particle is there.

    Returns:
        A figure bound to no window; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: there is no trajectory, or one that holds no record.
        ImportError: matplotlib is not installed.
    """
    if not trajectories:
        raise ValueError("plot_tau: trajectories is empty; pass one for each layer")
    for name, trajectory in trajectories.items():
        if not trajectory.steps:
            raise ValueError(f"plot_tau: the trajectory of {name!r} holds no record; call record() at least once")
    columns = min(len(trajectories), PANELS_IN_A_ROW)
    each = 1 + steps
    rows = -(-len(trajectories) // columns) * each
    figure = new_figure("plot_tau", 4.2 * columns, 3.4 * rows + 0.9, title, details)
    axes = figure.subplots(rows, columns, squeeze=False)
    for k in range(len(trajectories), columns * rows // each):
        for ax in axes[k // columns * each :, k % columns]:
            ax.set_visible(False)
    for k, (name, trajectory) in enumerate(trajectories.items()):
        row = k // columns * each
        _draw_positions(axes[row, k % columns], name, trajectory)
        axes[row, 0].set_ylabel("position $\\tau$")
        if steps:
            _draw_steps(axes[row + 1, k % columns], trajectory)
            axes[row + 1, 0].set_ylabel("step size $\\Delta\\tau$")
    return figure


def _draw_positions(ax: Axes, name: str, trajectory: Trajectory) -> None:
    n, resorts = len(trajectory.who), trajectory.resorts
    for curve, colour in zip(zip(*trajectory.tau, strict=True), colours(n), strict=True):
        ax.plot(trajectory.steps, curve, color=colour, linewidth=1.5)
    # In axis units from the foot, so that the ticks are there at any scale of tau.
    ax.vlines(resorts, 0, 0.035, transform=ax.get_xaxis_transform(), color="crimson", linewidth=0.9)
    counts = f"{n} particle{'s' * (n != 1)}, {len(resorts)} re-sort{'s' * (len(resorts) != 1)}"
    ax.set_title(f"{name}: {counts}", fontsize=10)
    over_steps(ax)


def _draw_steps(ax: Axes, trajectory: Trajectory) -> None:
    sizes = [[b - a for a, b in pairwise([0.0, *sorted(row)])] for row in trajectory.tau]
    for curve, colour in zip(zip(*sizes, strict=True), colours(len(trajectory.who)), strict=True):
        ax.plot(trajectory.steps, curve, color=colour, linewidth=1.5)
    over_steps(ax)
