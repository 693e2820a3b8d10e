"""The settings of birth and death, checked when they are given, and the rules that they name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch_meanfield.width.births.inherit import Clone, Split
from torch_meanfield.width.births.reinject import Initializer, Reinject
from torch_meanfield.width.births.rule import BirthRule
from torch_meanfield.width.births.steep import Steep
from torch_meanfield.width.births.typical import Typical
from torch_meanfield.width.turnover.decide import TurnoverRule
from torch_meanfield.width.turnover.dynamics import RECORDED
from torch_meanfield.width.turnover.exact import Exact
from torch_meanfield.width.turnover.plastic import Plastic
from torch_meanfield.width.turnover.standing_out import StandingOut

Births = Literal["clone", "split", "reinject", "typical"]
Scheme = Literal["standing_out", "exact", "plastic"]


@dataclass(frozen=True)
class Settings:
    """See :class:`.BirthDeathOptimizer` for what each of them means; what is ``None`` is
    filled in by the scheme.

    Raises:
        TypeError: a value of another type than a setting has.
        ValueError: a number out of its range, or an unknown choice.
    """

    rate: float
    every: int | None
    births: Births | BirthRule | None
    scheme: Scheme | TurnoverRule
    reinject: float
    steep: bool
    mass: float
    candidates: int
    window: float | None
    threshold: float
    batch_size: int | None = None
    dead_after: int = Plastic.dead_after
    max_share: float = Plastic.max_share
    moment_share: float | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("rate", 0.0, math.inf),
            ("reinject", 0.0, 1.0),
            ("mass", 0.0, math.inf),
            ("window", 1.0, math.inf),
            ("threshold", 0.0, math.inf),
            ("moment_share", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if name in ("window", "moment_share") and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if not math.isfinite(value) or not low <= value <= high:
                upper = "" if high == math.inf else f" and at most {high:g}"
                raise ValueError(f"{name} must be finite, at least {low:g}{upper}; got {value!r}")
        for name in ("every", "candidates"):
            value = getattr(self, name)
            if name == "every" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        size = self.batch_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
            raise TypeError(f"batch_size must be an integer or None, got {size!r}")
        if size is not None and size < 1:
            raise ValueError(f"batch_size must be at least 1, got {size}")
        for name, choices, methods in (
            ("births", BIRTHS, ("watch", "share_", "newborns")),
            ("scheme", SCHEMES, ("window", "decide")),
        ):
            given: Any = getattr(self, name)
            if given is None and name == "births":
                continue
            rule = not isinstance(given, (str, type)) and all(callable(getattr(given, m, None)) for m in methods)
            if not rule and not (isinstance(given, str) and given in choices):
                raise ValueError(
                    f"{name} must be one of {tuple(choices)} or a rule with the methods {', '.join(methods)}, got "
                    f"{given!r}"
                )
        Plastic(self.dead_after, self.max_share)  # checked under every scheme
        scheme = self._turnover()
        if self.every is None:
            object.__setattr__(self, "every", scheme.every)
        if self.moment_share is None:
            object.__setattr__(self, "moment_share", scheme.moment_share)
        if self.births is None:
            object.__setattr__(self, "births", scheme.births)
        if self.window is None:
            object.__setattr__(self, "window", scheme.window(self.steps_between))

    @property
    def active(self) -> bool:
        """Whether anything can ever happen."""
        return self.rate > 0 or self.reinject > 0

    @property
    def steps_between(self) -> int:
        """From one event to the next."""
        assert self.every is not None
        return self.every

    def _turnover(self) -> TurnoverRule:
        return SCHEMES[self.scheme](self) if isinstance(self.scheme, str) else self.scheme

    def rules(self, initializer: Initializer | None) -> tuple[TurnoverRule, BirthRule]:
        """The scheme, and the way of being born."""
        births: Any = self.births
        return self._turnover(), BIRTHS[births](self, initializer) if isinstance(births, str) else births


def _reinject(s: Settings, initializer: Initializer | None) -> BirthRule:
    if not s.steep or initializer is not None:
        return Reinject(initializer)
    return Steep(None, s.mass, s.candidates, min(RECORDED, s.steps_between))


# What a name means; a new scheme or way of being born is a class and one row here.
SCHEMES: dict[str, Callable[[Settings], TurnoverRule]] = {
    "standing_out": lambda s: StandingOut(s.rate, s.threshold),
    "exact": lambda s: Exact(s.rate),
    "plastic": lambda s: Plastic(s.dead_after, s.max_share),
}
BIRTHS: dict[str, Callable[[Settings, Initializer | None], BirthRule]] = {
    "clone": lambda s, initializer: Clone(initializer),
    "split": lambda s, initializer: Split(initializer),
    "reinject": _reinject,
    "typical": lambda s, initializer: Typical(initializer),
}
