"""What the pictures have in common: a figure without a window, its captions, colours and axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(caller: str, width: float, height: float, title: str | None, details: str | None) -> Figure:
    """An empty figure, in inches, with ``title`` in large print above and ``details`` in small print below.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{caller} needs matplotlib, which is not installed: pip install 'torch-meanfield[plot]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=13)
    if details:
        figure.supxlabel(details, fontsize=8, color="0.35")
    return figure


def colours(n: int) -> list[Any]:
    """Colours for n lines, from dark to light."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * i / max(1, n - 1)) for i in range(n)]


def tidy(ax: Axes) -> None:
    """A light grid, and no frame above and to the right."""
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def over_steps(ax: Axes) -> None:
    """Axes whose abscissa is the optimizer step and whose ordinate begins at 0."""
    ax.set_xlabel("optimizer step")
    ax.set_ylim(bottom=0)
    ax.margins(x=0)
    tidy(ax)
