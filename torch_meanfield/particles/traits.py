"""What the modules of a particle hold beside parameters and buffers, which goes with it all the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class Traits:
    """Train or eval mode (a frozen norm), plain tensor attributes and ``get_extra_state`` of every module.

    Args:
        particles: for each its modules, in one order.

    Raises:
        TypeError: a module that gives an extra state and takes none.
    """

    def __init__(self, particles: Sequence[Sequence[nn.Module]]) -> None:
        self._rows = list(zip(*particles, strict=False))
        for kind in {type(m) for row in self._rows for m in row if _has_extra(m)}:
            if kind.set_extra_state is nn.Module.set_extra_state:
                raise TypeError(
                    f"{kind.__name__} has get_extra_state() without set_extra_state(), so that this state cannot go "
                    f"with its block; define both, or keep blocks in their places (set_automatic_resort)"
                )

    def move_modes_(self, sources: Sequence[int]) -> None:
        """``new[i] = old[sources[i]]`` over the modes; as ``requires_grad``, a frozen block stays so where it goes."""
        for row in self._rows:
            modes = [m.training for m in row]
            if any(modes) and not all(modes):
                for module, j in zip(row, sources, strict=True):
                    module.training = modes[j]

    def move_(self, sources: Sequence[int]) -> None:
        """``new[i] = old[sources[i]]`` over plain tensors and extra state."""
        for row in self._rows:
            extra = {j: copy.deepcopy(row[j].get_extra_state()) for j in {*sources} if _has_extra(row[j])}
            plain = {j: _plain_tensors(row[j]) for j in {*sources}}
            for i, j in enumerate(sources):
                if i == j:
                    continue
                if j in extra:
                    row[i].set_extra_state(copy.deepcopy(extra[j]))
                for name, value in plain[j].items():
                    here = row[i].__dict__.get(name)
                    # one that blocks share is no block's; one of another shape may belong to a number beside it
                    if isinstance(here, Tensor) and here is not value and here.shape == value.shape:
                        row[i].__dict__[name] = value if sources.count(j) == 1 else value.clone()


def _has_extra(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Tensors that are neither parameters nor buffers, and no results of a computation (a hook's ``weight``)."""
    held: dict[str, Any] = module.__dict__
    return {k: v for k, v in held.items() if isinstance(v, Tensor) and v.grad_fn is None}
