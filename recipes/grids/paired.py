"""Paired comparison over seeds: both sides of a pair start from the same weights and see the same batches."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean of ``ours - theirs``, and half the width of its 95 % confidence interval by Student's t.

    Args:
        ours: One figure for each seed.
        theirs: The other side, in the same order.

    Returns:
        The mean difference, and the half-width; infinite for a single pair, whose spread nobody knows.

    Raises:
        ValueError: No pair, or sides of unequal length.
    """
    from scipy.stats import t

    if not ours or len(ours) != len(theirs):
        raise ValueError(f"paired: one figure for each seed on both sides; got {len(ours)} and {len(theirs)}")
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    n, mean = len(differences), statistics.mean(differences)
    if n == 1:
        return mean, math.inf
    return mean, float(t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)


def told(mean: float, half_width: float) -> str:
    """``mean ± half_width``; the mean alone where the interval is infinite."""
    return f"{mean:+.2f}" + (f" ± {half_width:.2f}" if math.isfinite(half_width) else "")
