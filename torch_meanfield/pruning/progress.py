"""A progress bar, where there is something that draws one."""

from __future__ import annotations

import importlib
from typing import Any


class Progress:
    """``tqdm``'s bar if it is wanted and installed; nothing otherwise.

    Args:
        wanted: whether to show it.
        total: blocks in all.
    """

    def __init__(self, wanted: bool, total: int) -> None:
        self._bar: Any = None
        if wanted:
            try:
                bars: Any = importlib.import_module("tqdm")
            except ModuleNotFoundError:
                return
            self._bar = bars.tqdm(total=total, desc="depth_scores", unit="block", leave=False)

    def update(self, amount: float) -> None:
        """So many blocks more are done."""
        if self._bar is not None:
            self._bar.update(amount)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
