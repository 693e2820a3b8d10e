"""Should ordinary training be wrapped? Birth and death on data that stay, paired by seed against the bare optimizer."""

from __future__ import annotations

import statistics
from typing import Any

from recipes.grids.paired import paired, told

OURS, BARE = "library, plastic", "bare"


def report(document: dict[str, Any]) -> str:
    """Table and verdict, from the content of stationary.json alone."""
    lines = [
        "| network | bare | wrapped | difference in points, paired, 95 % | seeds | silent units, bare | wrapped |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    differences = []
    for setting in dict.fromkeys(r["setting"] for r in document["runs"]):
        of = {
            method: {r["seed"]: r for r in document["runs"] if (r["setting"], r["method"]) == (setting, method)}
            for method in (BARE, OURS)
        }
        seeds = sorted(of[BARE].keys() & of[OURS].keys())
        if not seeds:
            continue
        bare, ours = ([100 * of[method][s]["score"] for s in seeds] for method in (BARE, OURS))
        differences.append(paired(ours, bare))
        silent = [f"{statistics.mean(of[method][s]['silent'] for s in seeds):.0%}" for method in (BARE, OURS)]
        lines.append(
            f"| {setting} | {statistics.mean(bare):.2f} | {statistics.mean(ours):.2f} | {told(*differences[-1])} "
            f"| {len(seeds)} | {silent[0]} | {silent[1]} |"
        )
    return "\n".join([*lines, "", verdict(differences), "", f"Made by `{document['command']}`.", ""])


def verdict(differences: list[tuple[float, float]]) -> str:
    """What the differences and their half-widths say, in words."""
    better = sum(d > half for d, half in differences)
    worse = sum(d < -half for d, half in differences)
    if not better and not worse:
        return (
            f"In none of {len(differences)} settings can wrapped and bare be told apart; a difference of up to "
            f"{max(abs(d) + half for d, half in differences):.1f} points cannot be excluded. There is no reason to "
            "wrap a training whose data stay."
        )
    return f"Of {len(differences)} settings, wrapped is ahead beyond noise in {better} and behind in {worse}."
