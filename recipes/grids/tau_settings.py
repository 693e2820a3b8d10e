"""One setting of the study of tau, and what its runs gave."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """Where the times start, and their learning rate over that of the weights."""

    horizon: float | None
    start: str
    scale: float

    @property
    def name(self) -> str:
        """Of its runs, without the seed."""
        return f"horizon-{self.horizon_told}-{self.start}-tau-lr-x{self.scale:g}"

    @property
    def horizon_told(self) -> str:
        """``n`` for as many as there are blocks."""
        return "n" if self.horizon is None else f"{self.horizon:g}"

    @property
    def args(self) -> list[str]:
        """Of the recipe."""
        horizon = "null" if self.horizon is None else str(self.horizon)
        options = {"horizon": horizon, "tau_init": self.start, "tau_lr_scale": str(self.scale)}
        return [word for option, value in options.items() for word in (f"--model.{option}", value)]


DEFAULT = Setting(None, "uniform", 1.0)  # of MeanFieldResNet and param_groups


@dataclass(frozen=True)
class Outcome:
    """What one setting gave over its seeds.

    Attributes:
        errors: By seed, the test error after the last epoch, percent.
        difference: Mean of error minus the vanilla twin's, points.
        half_width: Half its 95 % interval; infinite for one seed.
        resorts: By seed.
        steps: Smallest and largest final step size of all layers and seeds.
        spread: Standard deviation of the final step sizes over their mean, layer by layer, in the mean.
    """

    setting: Setting
    errors: dict[int, float]
    difference: float
    half_width: float
    resorts: list[int]
    steps: tuple[float, float]
    spread: float
