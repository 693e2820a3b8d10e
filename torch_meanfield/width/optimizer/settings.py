"""The settings of birth and death, checked when they are given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Births = Literal["clone", "split", "reinject"]
Scheme = Literal["standing_out", "exact"]

BIRTHS: tuple[Births, ...] = ("clone", "split", "reinject")
SCHEMES: tuple[Scheme, ...] = ("standing_out", "exact")


@dataclass(frozen=True)
class Settings:
    """See :class:`~torch_meanfield.width.optimizer.wrapper.BirthDeathOptimizer` for what each of them means.

    Raises:
        TypeError: a number that is none.
        ValueError: a number out of its range, or an unknown choice.
    """

    rate: float
    every: int
    births: Births
    scheme: Scheme
    reinject: float
    steep: bool
    mass: float
    candidates: int
    window: float
    threshold: float
    batch_size: int | None = None
    jitter: float = 0.01
    rows: int = 4096  # sampled rows for the landscape, per population

    def __post_init__(self) -> None:
        for name, low, high in (
            ("rate", 0.0, math.inf),
            ("reinject", 0.0, 1.0),
            ("mass", 0.0, math.inf),
            ("window", 1.0, math.inf),
            ("threshold", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if not math.isfinite(value) or not low <= value <= high:
                upper = "" if high == math.inf else f" and at most {high:g}"
                raise ValueError(f"{name} must be finite, at least {low:g}{upper}; got {value!r}")
        for name in ("every", "candidates"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        size = self.batch_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
            raise TypeError(f"batch_size must be an integer or None, got {size!r}")
        if size is not None and size < 1:
            raise ValueError(f"batch_size must be at least 1, got {size}")
        if self.births not in BIRTHS:
            raise ValueError(f"births must be one of {BIRTHS}, got {self.births!r}")
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {SCHEMES}, got {self.scheme!r}")
        if self.scheme == "standing_out" and self.rate > 1:
            raise ValueError(
                f"rate must be at most 1 under scheme='standing_out', where it is a share of the population; got "
                f"{self.rate!r}"
            )

    @property
    def coherence(self) -> float:
        r"""The least ratio of average to root mean square that ``threshold`` standard errors amount to.

        An exponential average with weights 1/window of noise of deviation s has the deviation s / sqrt(2 window - 1).
        """
        return self.threshold / math.sqrt(2 * self.window - 1)

    @property
    def active(self) -> bool:
        """Whether anything can ever happen."""
        return self.rate > 0 or self.reinject > 0

    @property
    def recorded(self) -> int:
        """Over how many of the steps before an event the landscape is sampled."""
        return max(1, min(40, self.every))
