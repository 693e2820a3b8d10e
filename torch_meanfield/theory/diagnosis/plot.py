"""The picture of a diagnosis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from torch_meanfield.theory.diagnosis.parts import Finding, Kernel, Layer, Particles

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(
    title: str,
    layers: Sequence[Layer],
    particles: Sequence[Particles],
    kernel: Kernel,
    findings: Sequence[Finding],
) -> Figure:
    """Six panels under ``title`` and the worst findings.

    They show length, correlation, gradients, chi, dead units and potentials, and steps or the kernel's spectrum.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(
            "plot needs matplotlib, which is not installed: pip install 'torch-meanfield[plot]'"
        ) from error

    figure = Figure(figsize=(13, 6.4), layout="constrained")
    axes: Any = figure.subplots(2, 3)
    panels: tuple[tuple[Any, str, tuple[tuple[str, list[float]], ...], str], ...] = (
        (axes[0][0], "length q", (("mean square of outputs", [a.q for a in layers]),), "log"),
        (axes[0][1], "correlation of two inputs", (("measured", [a.correlation for a in layers]),), "linear"),
        (
            axes[0][2],
            "gradient norms",
            (("by outputs", [a.gradient for a in layers]), ("by weights", [a.weight_gradient for a in layers])),
            "log",
        ),
        (axes[1][0], "predicted chi (1: critical)", (("a stack of such layers", [a.chi for a in layers]),), "linear"),
        (
            axes[1][1],
            "units",
            (("dead share", [a.dead for a in layers]), ("spread of potentials", [a.potential_spread for a in layers])),
            "linear",
        ),
    )
    for axis, name, curves, scale in panels:
        for label, values in curves:
            at = [(i, v) for i, v in enumerate(values) if math.isfinite(v) and (v > 0 or scale == "linear")]
            if at:
                axis.plot(*zip(*at, strict=True), marker=".", label=label)
        if axis.lines:
            axis.set_yscale(scale)
            axis.legend(fontsize=8)
        axis.set(title=name, xlabel="layer")
        axis.grid(alpha=0.3)
    axes[1][0].axhline(1, color="grey", linewidth=1)
    _last_panel(axes[1][2], particles, kernel)
    notes = [str(f) for f in findings] or ["Nothing stands out."]
    shown = "\n".join(line for note in notes[:4] for line in wrap(note, 170))
    figure.suptitle(f"{title}\n{shown}", fontsize=9)
    return figure


def _last_panel(axis: Any, particles: Sequence[Particles], kernel: Kernel) -> None:
    axis.grid(alpha=0.3)
    if not kernel.skipped:
        values = kernel.eigenvalues
        values = values.clamp_min(1e-16 * values[-1].item())  # what is 0 to rounding
        axis.plot(range(1, len(values) + 1), values, "o-", color="black", label="eigenvalues of the tangent kernel")
        axis.set(yscale="log", xlabel="rank (ascending)")
        axis.legend(fontsize=8, loc="upper left")
    axis.set_title("tangent kernel" + (" and steps dtau" if particles else ""))
    if particles:
        steps = axis.twinx() if axis.lines else axis
        for p in particles:
            steps.plot(range(1, len(p.steps) + 1), p.steps, alpha=0.6, label=f"{p.name}, horizon {p.horizon:.3g}")
        steps.legend(fontsize=7, loc="lower right")
