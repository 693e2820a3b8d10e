"""What a pruning did, as table and picture: errors, latencies, and what each block was worth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

REPEATS = 15


@torch.no_grad()
def latencies(
    models: Sequence[nn.Module],
    images: Tensor,
    repeats: int = REPEATS,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Median milliseconds of a forward pass of each model, one after the other in each round, so that load is shared.

    Args:
        models: In ``eval()``, on the device of the images.
        images: One batch.
        repeats: Rounds, after one that warms up.
        clock: ``time.process_time`` on a processor that others use as well.
    """
    times: list[list[float]] = [[] for _ in models]
    for _ in range(repeats + 1):
        for model, found in zip(models, times, strict=True):
            _wait(images)
            start = clock()
            model(images)
            _wait(images)
            found.append(1e3 * (clock() - start))
    return [statistics.median(found[1:]) for found in times]


def _wait(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def table(story: dict[str, Any]) -> str:
    """The removal in Markdown."""
    whole, left = story["blocks"], story["blocks"] - len(story["removed"])
    before, after = story["milliseconds"]
    rows = (
        ("as it was", whole, story["parameters"][0], story["error_before"], before),
        ("blocks removed, norms re-estimated", left, story["parameters"][1], story["error_after"], after),
        (f"fine-tuned, {story['optimizer_steps']} steps", left, story["parameters"][1], story["error"], after),
    )
    lines = [
        f"{story['network']} on {story['data']}, {len(story['removed'])} of {whole} blocks removed by {story['by']}:",
        "",
        "| network | blocks | parameters | error, % | ms a batch | times faster |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [f"| {n} | {b} | {p:,} | {e:.2f} | {ms:.2f} | {before / ms:.2f} |" for n, b, p, e, ms in rows]
    how = f"`{story['made_by']}` loads it" if story["made_by"] else "`torch.export.load` reads it"
    lines += [
        "",
        f"Removed: {', '.join(story['removed'])}. {story['file'] or 'The network'}: {how}, relative error "
        f"{story['relative_error']:.0e}. Latency in eval() of batches of {story['batch']}, rounds interleaved.",
    ]
    return "\n".join(lines) + "\n"


def draw(path: Path, story: dict[str, Any]) -> None:
    """Left the error against the latency, on the way from the whole network to the fine-tuned one; right the scores.

    Args:
        path: Path of the PNG.
        story: What the recipe writes to prune.json.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (errors, scores) = plt.subplots(1, 2, figsize=(11, 4))
    before, after = story["milliseconds"]
    points = [(before, story["error_before"]), (after, story["error_after"]), (after, story["error"])]
    names = ("as it was", "blocks removed", "fine-tuned")
    errors.plot(*zip(*points, strict=True), color="0.7", linewidth=1)
    for (x, y), name in zip(points, names, strict=True):
        errors.plot([x], [y], "o", markersize=8, label=name)
    errors.set(title=f"{story['network']} on {story['data']}", xlabel="ms a batch", ylabel="error, %")
    errors.set_xlim(left=0)
    errors.legend()
    order = [name for name in story["order"] if name in story["scores"]]
    gone = set(story["removed"])
    colours = ["C3" if name in gone else "C0" for name in order]
    scores.bar(range(len(order)), [story["scores"][name] for name in order], color=colours)
    scores.set_xticks(range(len(order)), order, rotation=90, fontsize=6)
    scores.set(title="red: removed", ylabel=f"score: {story['by']}", xlabel="block, in the order in which they go")
    for axis in (errors, scores):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
