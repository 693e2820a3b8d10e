"""What a removal did, as data that prints readably."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Constructor:
    """A call that makes the plain network of the depth that is left, without weights.

    Attributes:
        text: the call as one would write it.
        build: carries it out.
    """

    text: str
    build: Callable[[], Any] = field(repr=False, compare=False)

    def __call__(self) -> Any:
        """The network; ``load_state_dict(fold(model).state_dict())`` fits it with ``strict=True``."""
        return self.build()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class PruneReport:
    """What :func:`.prune_depth_` did.

    Attributes:
        removed: the names that the removed blocks had.
        kept: the names that the other blocks had, in the order they are in now.
        names: the names that those have now.
        layers: by name of the mean-field layer, how many blocks it had and has.
        parameters: of the model, before and after.
        difference: largest difference of the outputs on the example between the network whose removed blocks have
            step 0 and the one without them, relative to the largest output; 0 but where a block does more than add
            to the stream (a norm or a convolution on the stream itself). ``None`` if there was no example.
        constructor: makes the plain network that the folded state dict loads into; ``None``: none is known, and the
            folded module itself is to be saved.
        latency: seconds of a forward pass before and after, where ``to_latency`` was asked for.
        norms: how many norms were re-estimated.
        optimizers: how many lost parameters.
        averages: how many averaged copies lost blocks.
        notes: what else has to be done or known.
    """

    removed: tuple[str, ...]
    kept: tuple[str, ...]
    names: tuple[str, ...]
    layers: dict[str, tuple[int, int]]
    parameters: tuple[int, int]
    difference: float | None = None
    constructor: Constructor | None = None
    latency: tuple[float, float] | None = None
    norms: int = 0
    optimizers: int = 0
    averages: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [
            f"{len(self.removed)} of {len(self.removed) + len(self.kept)} blocks removed, "
            f"{before:,} -> {after:,} parameters"
        ]
        lines += [f"  {name}: {was} -> {now} blocks" for name, (was, now) in self.layers.items() if was != now]
        lines.append(f"  removed: {', '.join(self.removed)}")
        if self.latency is not None:
            was, now = self.latency
            lines.append(f"  a forward pass: {1e3 * was:.1f} -> {1e3 * now:.1f} ms ({was / now:.2f} times faster)")
        if self.norms:
            lines.append(f"  {self.norms} norms re-estimated")
        if self.optimizers or self.averages:
            lines.append(f"  {self.optimizers} optimizers and {self.averages} averaged copies follow")
        if self.constructor is not None:
            lines.append(f"  fold(model).state_dict() loads into {self.constructor}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])
