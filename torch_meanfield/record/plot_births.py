"""The picture of births and deaths: how many over time, and the potentials of those that live."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from torch_meanfield.record.turnover import Turnover

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED = 12  # populations in the legend; of more than these, the ones that changed most
BINS = 41


def plot_births(turnovers: Mapping[str, Turnover], title: str | None = None, details: str | None = None) -> Figure:
    """Draw, for each population, the units replaced since the start, and the last averaged potentials.

    The potentials of each population are divided by their root mean square, since layers differ by orders of magnitude.
    Right of 0 are the units without which the loss would fall.

    Args:
        turnovers: by population, in the order of the colours.
        title: in large print above.
        details: in small print below: data set, seed, versions.

    Returns:
        a figure bound to no window; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: no population, or one without a record.
        ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    if not turnovers:
        raise ValueError("plot_births: turnovers is empty; pass one for each population")
    for name, turnover in turnovers.items():
        if not turnover.steps:
            raise ValueError(f"plot_births: the record of {name!r} is empty; no event was due yet")
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    over_time, histogram = figure.subplots(1, 2)
    colours = {name: colormaps["viridis"](0.9 * i / max(1, len(turnovers) - 1)) for i, name in enumerate(turnovers)}
    busiest = sorted(turnovers, key=lambda name: -sum(turnovers[name].killed))[:NAMED]
    for name, turnover in turnovers.items():
        label = f"{name}: {sum(turnover.killed)} of {turnover.n} units" if name in busiest else None
        over_time.step(
            [0, *turnover.steps], [0, *accumulate(turnover.killed)], where="post", color=colours[name], label=label
        )
        scale = (sum(v * v for v in turnover.potentials) / turnover.n) ** 0.5 or 1.0
        histogram.hist(
            [v / scale for v in turnover.potentials],
            bins=BINS,
            range=(-5, 5),
            histtype="step",
            weights=[1 / turnover.n] * turnover.n,
            color=colours[name],
        )
    total = sum(sum(t.killed) for t in turnovers.values())
    born = sum(sum(t.born) for t in turnovers.values())
    over_time.set_title(f"{total} units replaced: {born} drawn anew, {total - born} copies", fontsize=10)
    over_time.set_xlabel("optimizer step")
    over_time.set_ylabel("units replaced since the start")
    over_time.set_ylim(bottom=0)
    over_time.margins(x=0)
    over_time.legend(fontsize=7, frameon=False)
    histogram.set_title("averaged potentials before the last event", fontsize=10)
    histogram.set_xlabel("potential / root mean square of its population")
    histogram.set_ylabel("share of the units")
    histogram.axvline(0, color="0.35", linewidth=0.8)
    for ax in (over_time, histogram):
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=13)
    if details:
        figure.supxlabel(details, fontsize=8, color="0.35")
    return figure
