"""The picture of the table: the paired differences, and the curves behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"vanilla": "tab:grey", "mean-field": "tab:blue"}


def draw(path: Path, rows: dict[str, dict[str, Any]], curves: dict[str, dict[str, list[list[float]]]]) -> None:
    """Left the difference mean-field - vanilla of each row with its interval, right the test errors by epoch.

    Args:
        path: Path of the PNG.
        rows: By network: ``difference`` and ``half_width_95`` in points (``None``: unknown), ``published`` (the pair of
            published errors, or ``None``: not shown).
        curves: By panel title: for each twin, one list of test errors in percent for each seed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 + 4.2 * len(curves), 3.8), layout="constrained")
    axes = figure.subplots(1, 1 + len(curves), squeeze=False)[0]
    forest, panels = axes[0], axes[1:]
    for y, row in enumerate(rows.values()):
        width = row["half_width_95"]
        forest.errorbar(row["difference"], y, xerr=width, fmt="o", color="tab:blue", capsize=4)
        if row["published"]:
            vanilla, mean_field = row["published"]
            forest.plot(mean_field - vanilla, y, "D", color="tab:orange", label="published" if y == 0 else None)
    forest.axvline(0, color="black", linewidth=0.8)
    forest.set(yticks=range(len(rows)), yticklabels=list(rows), ylim=(len(rows) - 0.5, -0.5))
    forest.set(xlabel="test error, mean-field - vanilla, points", title="paired over seeds, 95 % interval")
    forest.grid(axis="x", alpha=0.3)
    if forest.get_legend_handles_labels()[0]:
        forest.legend(frameon=False)
    for panel, (title, twins) in zip(panels, curves.items(), strict=True):
        for twin, seeds in twins.items():
            for curve in seeds:
                panel.plot(range(1, len(curve) + 1), curve, color=COLOURS[twin], linewidth=0.7, alpha=0.5)
            mean = [sum(at) / len(at) for at in zip(*seeds, strict=True)] if seeds else []
            panel.plot(range(1, len(mean) + 1), mean, color=COLOURS[twin], linewidth=2, label=twin)
        panel.set(title=title, xlabel="epoch", ylabel="test error, %")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    figure.savefig(path, dpi=120)
