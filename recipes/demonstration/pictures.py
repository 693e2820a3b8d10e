"""The tables and pictures of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.demonstration.changing_places import DEPTH, Outcome
from recipes.demonstration.learning_on import Learner
from torch_meanfield.lightning import plot_tau
from torch_meanfield.record import Trajectory


def table(rows: Sequence[Sequence[str]]) -> str:
    """``rows``, the first of them the head, as a Markdown table that also reads well as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        return "| " + " | ".join(cells) + " |"

    return "\n".join(line(row) for row in [rows[0], rule, *rows[1:]])


def learning_table(learners: Sequence[Learner]) -> str:
    """Accuracy in quarters of the stream, then the units."""
    n = len(learners[0].curve)
    cuts = sorted({round(n * i / 4) for i in range(5)})
    head = ["training accuracy at the end of tasks", *(f"{a + 1} to {b}" for a, b in pairwise(cuts))]
    rows = [[*head, "silent units", "units born"]]
    for each in learners:
        quarters = [f"{sum(each.curve[a:b]) / (b - a):.2f}" for a, b in pairwise(cuts)]
        rows.append([each.name, *quarters, f"{100 * each.silent:.0f} %", str(each.births)])
    return table(rows)


def places_table(outcomes: Sequence[Outcome]) -> str:
    """Test errors and re-sorts."""
    rows = [[f"ResNet-{DEPTH}", "test error", "steps", "re-sorts"]]
    return table([*rows, *([o.name, f"{o.error:.1f} %", str(o.steps), str(o.resorts)] for o in outcomes)])


def draw_both(learners: Sequence[Learner], outcome: Outcome, path: Path) -> None:
    """The picture of the project: who goes on learning, and the stage whose blocks changed places most often."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for each, colour in zip(learners, ("0.55", "crimson"), strict=True):
        left.plot(range(1, len(each.curve) + 1), each.curve, color=colour, linewidth=2, label=each.name)
    left.set(title="Labels drawn anew at each task", xlabel="task", ylabel="accuracy at its end", ylim=(0, 1))
    left.set_xticks(range(0, len(learners[0].curve) + 1, max(1, len(learners[0].curve) // 4)))
    left.legend(frameon=False, loc="lower left")
    trajectory = max(outcome.monitor.trajectories.values(), key=lambda t: len(t.resorts))
    draw_times(right, trajectory)
    right.set(title=f"Blocks that change places {len(trajectory.resorts)} times", xlabel="optimizer step")
    right.set_ylabel(r"time $\tau$")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def draw_times(axis: Axes, trajectory: Trajectory) -> None:
    """One line for each block, dark where it began early."""
    from matplotlib import colormaps

    n = len(trajectory.who)
    for i, curve in enumerate(zip(*trajectory.tau, strict=True)):
        axis.plot(trajectory.steps, curve, color=colormaps["viridis"](0.9 * i / max(1, n - 1)), linewidth=1.8)


def draw_stages(outcome: Outcome, seed: int, made_by: dict[str, object], path: Path) -> None:
    """The times of all stages, a panel each."""
    trajectories = {f"stage {i + 1}": trajectory for i, trajectory in enumerate(outcome.monitor.trajectories.values())}
    versions = made_by["versions"]
    assert isinstance(versions, dict)
    details = (
        f"digits (scikit-learn), seed {seed}, test error {outcome.error:.1f} %; horizon T = 1, tau at 3 times the "
        "learning rate, which falls at 50 % and 75 % of the steps.\nOne line: one residual block. Red ticks: re-sorts. "
        f"torch-meanfield {versions['torch-meanfield']}, torch {versions['torch']}, {made_by['device']}."
    )
    title = f"ResNet-{DEPTH} on digits: its residual blocks learn their order"
    plot_tau(trajectories, title=title, details=details).savefig(path, dpi=120)
