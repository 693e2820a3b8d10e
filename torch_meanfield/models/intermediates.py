"""Feature maps from inside a network, with the signature that timm's feature extraction calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


def forward_intermediates(
    stem: nn.Module,
    stages: Sequence[nn.Module],
    head: Callable[[Tensor], Tensor],
    x: Tensor,
    indices: int | list[int] | None = None,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
    """Outputs of chosen stages, and the final features unless ``intermediates_only``.

    Args:
        stem: what comes before the first stage.
        stages: in order.
        head: the final norm and activation.
        x: ``(B, in_chans, H, W)``.
        indices: stages (negative ones from the end), the last n of them, or ``None`` for all.
        norm: apply the final norm and activation to the last stage's output in the list.
        stop_early: stop after the last stage asked for; allowed with ``intermediates_only``.
        output_fmt: ``"NCHW"`` only.
        intermediates_only: return the list alone.

    Raises:
        ValueError: another format, a stage that does not exist, or ``stop_early`` where the features are wanted.
    """
    if output_fmt != "NCHW":
        raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
    if stop_early and not intermediates_only:
        raise ValueError("stop_early needs intermediates_only=True: the final features come from the last stage")
    wanted = take_indices(indices, len(stages))
    out: list[Tensor] = []
    x = stem(x)
    for i, stage in enumerate(stages):
        x = stage(x)
        if i in wanted:
            out.append(head(x) if norm and i == len(stages) - 1 else x)
        if stop_early and i == max(wanted):
            break
    return out if intermediates_only else (head(x), out)


def take_indices(indices: int | list[int] | tuple[int, ...] | None, n: int) -> set[int]:
    """Stage numbers in ``0..n-1`` from timm's ``indices`` argument."""
    if indices is None:
        return set(range(n))
    if isinstance(indices, int):
        if not 0 < indices <= n:
            raise ValueError(f"indices must ask for 1 to {n} stages, got {indices}")
        return set(range(n - indices, n))
    bad: list[Any] = [i for i in indices if not -n <= i < n]
    if bad or not indices:
        raise ValueError(f"indices must be stages in {-n}..{n - 1}, got {list(indices)}")
    return {i % n for i in indices}
