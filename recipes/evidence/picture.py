"""The picture of the fine-tuning comparison: error by rate, the way down, and the pairs."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from recipes.evidence.rows import by_arm, errors_by_seed, groups


def draw(path: Path, document: dict[str, Any]) -> None:
    """A row of three panels for each network and length.

    Left the error on the tuning images by rate; in the middle the training loss at each arm's rate, the mean over
    seeds; right each seed's error minus that of `plain`.

    Args:
        path: Path of the PNG.
        document: What :mod:`.finetune` wrote.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = groups(document["runs"])
    figure, axes = plt.subplots(len(rows), 3, figsize=(14, 3.9 * len(rows)), squeeze=False)
    for (rates, losses, pairs), (network, steps, runs) in zip(axes, rows, strict=True):
        tuning, fresh = by_arm(runs, "tuning"), by_arm(runs, "report")
        colours = {arm: f"C{i}" for i, arm in enumerate(tuning)}
        for arm, found in tuning.items():
            at = sorted({r["rate"] for r in found if r["error"] is not None})
            errors = [[r["error"] for r in found if r["rate"] == x and r["error"] is not None] for x in at]
            rates.plot(at, [statistics.mean(e) for e in errors], "o-", color=colours[arm], label=arm)
        plain = errors_by_seed(fresh.get("plain", []))
        for place, (arm, found) in enumerate(fresh.items()):
            curve = [statistics.mean(part) for part in zip(*(r["loss"] for r in found), strict=False)]
            losses.plot([(i + 0.5) * steps / len(curve) for i in range(len(curve))], curve, color=colours[arm])
            differences = [e - plain[s] for s, e in errors_by_seed(found).items() if s in plain]
            pairs.plot([place] * len(differences), differences, "o", color=colours[arm], alpha=0.6)
            if differences:
                mean = statistics.mean(differences)
                pairs.plot([place - 0.25, place + 0.25], [mean, mean], color=colours[arm], linewidth=2.5)
        rates.set(title=f"{network}, {steps} steps: choosing the rate", xlabel="learning rate", xscale="log")
        rates.set_ylabel("test error, %, tuning images")
        rates.legend(fontsize=7)
        losses.set(title="fresh seeds, each arm at its rate", xlabel="step", ylabel="training loss")
        pairs.axhline(0, color="black", linewidth=0.8)
        pairs.set(title="each seed against plain", ylabel="test error minus plain, points")
        pairs.set_xticks(range(len(fresh)), list(fresh), rotation=20, ha="right", fontsize=7)
        for axis in (rates, losses, pairs):
            axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
