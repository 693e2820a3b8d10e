"""The picture of a mean-field network in training: the times of its particles, one panel for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch_meanfield.lightning.trajectories import Trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS_IN_A_ROW = 3


def plot_tau(
    trajectories: Mapping[str, Trajectory], title: str | None = None, details: str | None = None
) -> Figure:
    """Draw the position of every particle over the optimizer steps, each followed through the re-sorts.

    A line keeps its particle, and its colour the place where that particle started (dark: early, light: late), so
    lines that cross are particles that changed places. The ticks at the foot of a panel are the re-sorts.

    Args:
        trajectories: by layer name, in the order of the panels.
        title: in large print above the panels.
        details: in small print below them: data set, seed, versions.

    Returns:
        a figure bound to no window; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: no trajectory, or one that holds no record.
        ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    if not trajectories:
        raise ValueError("plot_tau: trajectories is empty; pass one for each layer")
    for name, trajectory in trajectories.items():
        if not trajectory.steps:
            raise ValueError(f"plot_tau: the trajectory of {name!r} holds no record; call record() at least once")
    columns = min(len(trajectories), PANELS_IN_A_ROW)
    rows = -(-len(trajectories) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[len(trajectories) :]:
        ax.set_visible(False)
    for ax, (name, trajectory) in zip(axes.flat, trajectories.items(), strict=False):
        n, resorts = len(trajectory.who), trajectory.resorts
        for particle, curve in enumerate(zip(*trajectory.tau, strict=True)):
            colour = colormaps["viridis"](0.9 * particle / max(1, n - 1))
            ax.plot(trajectory.steps, curve, color=colour, linewidth=1.5)
        # In axis units from the foot, so that the ticks are there at any scale of tau.
        ax.vlines(resorts, 0, 0.035, transform=ax.get_xaxis_transform(), color="crimson", linewidth=0.9)
        counts = f"{n} particle{'s' * (n != 1)}, {len(resorts)} re-sort{'s' * (len(resorts) != 1)}"
        ax.set_title(f"{name}: {counts}", fontsize=10)
        ax.set_xlabel("optimizer step")
        ax.set_ylim(bottom=0)
        ax.margins(x=0)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    for row in axes:
        row[0].set_ylabel("position $\\tau$")
    if title:
        figure.suptitle(title, fontsize=13)
    if details:
        figure.supxlabel(details, fontsize=8, color="0.35")
    return figure
