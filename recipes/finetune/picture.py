"""The picture of the fine-tuning comparison: errors by epoch, and the step sizes that were learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(path: Path, label: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Left the test errors (thin: seeds, thick: their mean), right the final step sizes in the order of execution.

    Args:
        path: Path of the PNG.
        label: The data set's name.
        runs: Records of the runs by method.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (errors, steps) = plt.subplots(1, 2, figsize=(10.5, 4))
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for colour, (method, records) in zip(colours, runs.items(), strict=False):
        curves = [[e["val_error"] for e in record["epochs"]] for record in records]
        epochs = range(1, len(curves[0]) + 1)
        for curve in curves:
            errors.plot(epochs, curve, color=colour, linewidth=0.7, alpha=0.5)
        errors.plot(
            epochs, [sum(c) / len(c) for c in zip(*curves, strict=True)], color=colour, linewidth=2, label=method
        )
        for record in records:
            at = 0
            for stage in record["steps"].values():
                steps.plot(range(at, at + len(stage)), stage, ".-", color=colour, linewidth=0.7, alpha=0.7)
                at += len(stage) + 1  # a gap between the stages
    errors.set(title=f"fine-tuning on {label}", xlabel="epoch", ylabel="test error, %", xticks=list(epochs))
    errors.grid(alpha=0.3)
    errors.legend()
    steps.axhline(1.0, color=colours[0], linewidth=2)
    steps.set(title="step sizes at the end, stage by stage", xlabel="block", ylabel="step size", xticks=[])
    steps.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
