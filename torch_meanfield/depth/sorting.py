"""Re-sorting: the particles of a layer take the order of their times (Lu et al. 2020, Algorithm 1)."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Protocol

from torch import Tensor
from torch.optim import Optimizer

from torch_meanfield.depth.tau_axis import TauAxis
from torch_meanfield.particles import Motion, Population, transport_


class Sortable(Protocol):
    """A mean-field layer, as far as re-sorting needs to know it."""

    tau_axis: TauAxis
    auto_resort: bool

    def population(self) -> Population:
        """The particles, in the order of their slots."""
        ...

    def check_held_(self) -> None:
        """See that the steps act on all branches, wherever those lie."""
        ...

    def _label(self) -> str: ...


def sort_(layer: Sortable, cause: str, optimizers: Iterable[Optimizer] = ()) -> Motion | None:
    """Project tau to [0, inf) and bring the slots of ``layer`` into its order; equal positions keep theirs."""
    tau = layer.tau_axis.read()
    if tau.is_meta:
        return None
    tau = tau.cpu()
    if not bool(tau.isfinite().all()):
        _warn_once(layer, tau)
        return None
    if bool((tau < 0).any()):
        layer.tau_axis.project_()
        tau = tau.clamp(min=0)
    motion = transport_(
        layer.population(),
        tau.argsort(stable=True),
        optimizers=optimizers,
        cause=cause,
        state=cause != "load",
    )
    layer.tau_axis.keep_exact_()
    layer.tau_axis.mark_sorted()
    return motion


_warned: weakref.WeakSet[Sortable] = weakref.WeakSet()


def _warn_once(layer: Sortable, tau: Tensor) -> None:
    if layer not in _warned:
        _warned.add(layer)
        warnings.warn(
            f"{layer._label()}: tau is not finite ({tau.tolist()}), so its branches are not re-sorted; the training "
            f"has diverged or an update was not finite (said once for this layer)",
            RuntimeWarning,
            stacklevel=2,
        )
