"""The picture of the study of tau: two maps over the settings, of the error and of the re-sorts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from recipes.grids.tau_settings import Outcome


def draw(path: Path, outcomes: Sequence[Outcome], title: str) -> None:
    """Rows: horizon and start; columns: learning rate of tau. Left the error against the twin, right the re-sorts.

    Args:
        path: Path of the PNG.
        outcomes: Outcomes of all settings.
        title: Above both maps.
    """
    import numpy
    from matplotlib.colors import CenteredNorm, SymLogNorm
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys((o.setting.horizon_told, o.setting.start) for o in outcomes))
    columns = sorted({o.setting.scale for o in outcomes})
    error, resorts = numpy.full((2, len(rows), len(columns)), numpy.nan)  # blank where nothing has been run
    for o in outcomes:
        at = rows.index((o.setting.horizon_told, o.setting.start)), columns.index(o.setting.scale)
        error[at], resorts[at] = o.difference, statistics.mean(o.resorts)
    figure = Figure(figsize=(11, 1.6 + 0.5 * len(rows)), layout="constrained")
    maps = (
        ("test error minus the vanilla twin's, points", error, "RdBu_r", CenteredNorm(), "{:+.2f}"),
        ("re-sorts in a run", resorts, "Purples", SymLogNorm(1, vmin=0, vmax=max(1, numpy.nanmax(resorts))), "{:.0f}"),
    )
    for axis, (name, values, colours, norm, form) in zip(figure.subplots(1, 2), maps, strict=True):
        image = axis.imshow(values, cmap=colours, norm=norm, aspect="auto")
        for y, x in numpy.argwhere(numpy.isfinite(values)):
            red, green, blue, _ = image.cmap(image.norm(values[y, x]))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            axis.text(x, y, form.format(values[y, x]), ha="center", va="center", color="white" if dark else "black")
        axis.set(title=name, xlabel="learning rate of tau over that of the weights")
        axis.set_xticks(range(len(columns)), [f"x{scale:g}" for scale in columns])
        axis.set_yticks(range(len(rows)), [f"horizon {horizon}, {start}" for horizon, start in rows])
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
