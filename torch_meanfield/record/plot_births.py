"""The picture of births and deaths: how many over time, and the potentials of those that live."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from torch_meanfield.record.birth_record import BirthRecord
from torch_meanfield.record.figures import colours, new_figure, over_steps, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED = 12  # populations in the legend; of more than these, the ones that changed most
BINS = 41


def plot_births(turnovers: Mapping[str, BirthRecord], title: str | None = None, details: str | None = None) -> Figure:
    """Draw, for each population, the units replaced since the start, and the last averaged potentials.

    The potentials of each population are divided by their root mean square, since layers differ by orders of magnitude.
    Right of 0 are the units without which the loss would fall.

    Args:
        turnovers: records by population, in the order of the colours.
        title: text in large print above.
        details: text in small print below: data set, seed, versions.

    Returns:
        A figure bound to no window; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: there is no population, or one without a record.
        ImportError: matplotlib is not installed.
    """
    if not turnovers:
        raise ValueError("plot_births: turnovers is empty; pass one for each population")
    for name, record in turnovers.items():
        if not record.steps:
            raise ValueError(
                f"plot_births: the record of {name!r} is empty; no event was due yet: train for more "
                "steps, or lower every= of the BirthDeathOptimizer"
            )
    figure = new_figure("plot_births", 10.5, 4.2, title, details)
    over_time, histogram = figure.subplots(1, 2)
    busiest = sorted(turnovers, key=lambda name: -sum(turnovers[name].killed))[:NAMED]
    for (name, record), colour in zip(turnovers.items(), colours(len(turnovers)), strict=True):
        label = f"{name}: {sum(record.killed)} of {record.n} units" if name in busiest else None
        over_time.step([0, *record.steps], [0, *accumulate(record.killed)], where="post", color=colour, label=label)
        scale = (sum(v * v for v in record.potentials) / record.n) ** 0.5 or 1.0
        histogram.hist(
            [v / scale for v in record.potentials],
            bins=BINS,
            range=(-5, 5),
            histtype="step",
            weights=[1 / record.n] * record.n,
            color=colour,
        )
    total = sum(sum(r.killed) for r in turnovers.values())
    born = sum(sum(r.born) for r in turnovers.values())
    over_time.set_title(f"{total} units replaced: {born} drawn anew, {total - born} copies", fontsize=10)
    over_time.set_ylabel("units replaced since the start")
    over_steps(over_time)
    over_time.legend(fontsize=7, frameon=False)
    histogram.set_title("averaged potentials before the last event", fontsize=10)
    histogram.set_xlabel("potential / root mean square of its population")
    histogram.set_ylabel("share of the units")
    histogram.axvline(0, color="0.35", linewidth=0.8)
    tidy(histogram)
    return figure
