"""The tau axis of one layer: where each particle stands in time, kept in float32 or wider."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import add
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_meanfield._torch import buffers_of, is_watched, parameters_of, untransformed, version_of
from torch_meanfield.particles.copying import is_sharded, whole, write_


class TauAxis(nn.Module):
    """Positions ``tau = anchor + offset`` of n particles, one slot each, in the order of the slots.

    The buffer ``anchor`` holds the places where the particles were put (the uniform grid, unless told otherwise), the
    parameter ``offset`` what they have learned since, and both belong to the particle and move with it. Weight decay
    therefore pulls towards the placement, never towards tau = 0: it cannot shrink the horizon.

    Both tensors keep at least float32, whatever ``.half()`` or ``.to(dtype)`` asks of the model: near 50 a bfloat16
    tau could not move by 0.1.

    Args:
        n: number of particles.
        horizon: the last position T of the uniform grid (a time; at T = n every step is exactly 1).
        learn: whether ``offset`` is a parameter; ``False`` leaves the positions fixed.
        device, dtype: of both tensors; dtype is float32 or float64.

    Source: Lu et al. 2020, eq. (15); tau is unconstrained there except for its order.
    """

    anchor: Tensor
    offset: nn.Parameter | None
    horizon: float | None = None  # of an axis pickled before it had one: n
    random = False  # whether a reset draws the positions from U(0, T), rather than taking the grid

    def __init__(
        self,
        n: int,
        horizon: float,
        *,
        learn: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.horizon = horizon
        grid = _grid(n, horizon, device, dtype)
        self.register_buffer("anchor", grid)
        self.offset = nn.Parameter(torch.zeros_like(grid)) if learn else None
        # FSDP2 with a narrow param_dtype hands forward() a rounded offset. A gathered float32 copy stands in for it.
        # Not a buffer: averaging tools pair the buffers of two models, and only a sharded one has this.
        self.exact_offset: Tensor | None = None
        self.unit_steps = not learn and horizon == n  # every step is exactly 1 and stays so
        self._sorted_at: tuple[int, ...] = ()  # version at which the slots were last known to be in the order of tau

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Put the particles where a new layer has them, as tools do for modules that were made on the meta device."""
        n, horizon = self.anchor.numel(), self.horizon or float(self.anchor.numel())
        values = _grid(n, horizon, self.anchor.device, self.anchor.dtype)
        self.place_(torch.rand_like(values).sort().values * horizon if self.random else values)
        self.unit_steps = self.offset is None and not self.random and horizon == n

    @property
    def is_fresh(self) -> bool:
        """Whether the particles stand on the uniform grid, or nowhere yet (read from the device)."""
        n = self.anchor.numel()
        values = self.read()
        if values.is_meta:
            return True
        return bool((values == _grid(n, self.horizon or float(n), values.device, values.dtype)).all())

    def positions(self) -> Tensor:
        """Differentiable positions by slot, shape ``(n,)``: ascending once sorted, float32 or float64."""
        offset = self.offset
        if offset is None or offset.is_meta:  # called, so that hooks bring in what was offloaded
            return cast(Tensor, self())
        return self.anchor + self._exact(offset)

    def forward(self) -> Tensor:
        """See :meth:`positions`."""
        offset = self.offset
        return self.anchor if offset is None else self.anchor + self._exact(offset)

    def _exact(self, offset: Tensor) -> Tensor:
        if offset.dtype in (torch.float32, torch.float64):
            return offset
        wide = offset.to(self.anchor.dtype)
        if self.exact_offset is None:
            return wide
        # Only where the copy still rounds to what came in: an offset changed behind our back wins over the copy.
        exact = torch.where(self.exact_offset.to(offset.dtype) == offset, self.exact_offset, wide)
        return exact.detach() + (wide - wide.detach())

    def read(self) -> Tensor:
        """Detached positions by slot, gathered from all ranks if the offset is sharded."""
        offset = self.offset
        if offset is None or offset.is_meta:
            return self.positions().detach()
        return self.anchor + whole(offset)

    @torch.no_grad()
    def place_(self, values: Tensor | Sequence[float]) -> None:
        """Put the particles at ``values`` (by slot), exactly; what they had learned is part of that now.

        Raises:
            ValueError: not one finite value for each particle. Those below 0 are put at 0.
        """
        self.anchor.copy_(check_positions(values, self))
        self.unit_steps = False
        if self.offset is not None:
            self.offset.zero_()
        self.keep_exact_()

    @torch.no_grad()
    def project_(self) -> None:
        """Move every position below 0 to 0."""
        if self.offset is None:
            self.anchor.clamp_(min=0)
        else:
            # anchor + (-anchor) is exactly 0, where a clamped sum might leave a rounding error below it
            write_(self.offset, torch.maximum(whole(self.offset), -self.anchor))
        self.keep_exact_()

    def keep_exact_(self) -> None:
        """Refresh the float32 copy of a sharded offset; on all ranks at once, since it gathers."""
        offset = self.offset
        if offset is not None and is_sharded(offset):
            self.exact_offset = whole(offset).clone()

    def mark_sorted(self, known: bool = True) -> None:
        """Note that the slots are in the order of tau, as it is now, or that this is no longer known."""
        self.__dict__["_sorted_at"] = self.version() if known else ()  # past Module.__setattr__, at every step

    def is_sorted(self) -> bool:
        """Whether the slots are known to be in the order of tau, without reading it."""
        return self._sorted_at == self.version()

    def in_order(self) -> bool:
        """Whether the slots are in the order of tau, which is read where that is free: on the CPU, in eager code.

        A write through ``tau.data`` is seen by its values alone. Elsewhere it is seen at the next optimizer step.
        """
        if not self.is_sorted():
            return False
        anchor, offset = buffers_of(self)["anchor"], parameters_of(self).get("offset")  # not by slow attributes
        assert anchor is not None
        if not _is_readable(anchor, offset):
            return True
        times: Iterable[float] = anchor.tolist()
        if ascending(times if offset is None else map(add, times, offset.tolist())):  # then their rounded sums are, too
            return True
        self.mark_sorted(False)
        return False

    def has_unit_steps(self) -> bool:
        """Whether every step is exactly 1 and stays so."""
        if not self.unit_steps or torch.compiler.is_compiling() or not _is_readable(self.anchor):
            return self.unit_steps
        return bool(self.anchor.tolist() == list(range(1, self.anchor.numel() + 1)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        cast(Any, super()).__setstate__(state)
        self._sorted_at = ()  # a version names tensors by their place in memory, which a copy's are not

    def version(self) -> tuple[int, ...]:
        """Changes whenever the positions are replaced or learned, without reading them.

        The count of in-place writes of ``anchor`` is left out: data parallel training broadcasts every buffer at each
        forward pass, which would look like a change. Only :meth:`place_`, loading and motions write it.
        """
        offset = self.offset
        if offset is None:
            return (id(self.anchor),)
        if isinstance(offset, torch.fx.Proxy):
            raise TypeError(
                "a mean-field layer reads the order of its blocks when it runs, which torch.fx.symbolic_trace (and so "
                "create_feature_extractor, prepare_qat_fx) cannot follow; torch.compile, torch.export and the eager "
                "prepare_qat can, and fold(model) gives a plain copy of a converted model"
            )
        return id(self.anchor), id(offset), version_of(offset)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TauAxis:
        def keep(t: Tensor) -> Tensor:
            out = fn(t)
            if out.is_floating_point() and torch.finfo(out.dtype).bits < 32:
                return t.to(out.device, torch.float32)
            return out

        blank = self.anchor.is_meta
        cast(Any, super())._apply(keep, recurse)
        if blank and not self.anchor.is_meta:
            self.reset_parameters()  # to_empty(): what it found there are no positions
        return self

    def extra_repr(self) -> str:
        """Number of particles, and whether they move."""
        return f"{self.anchor.numel()}, learn={self.offset is not None}"


def _grid(n: int, horizon: float, device: torch.device | None, dtype: torch.dtype) -> Tensor:
    # arange before the division: at horizon n the grid holds exact integers, so every step is exactly 1.0.
    return torch.arange(1, n + 1, device=device, dtype=dtype) * (horizon / n)


def _is_readable(anchor: Tensor, offset: Tensor | None = None) -> bool:
    """Whether a read of the positions costs nothing and disturbs nobody."""
    if not anchor.is_cpu or is_watched() or cast(Any, torch).jit.is_tracing():
        return False
    return offset is None or not is_sharded(offset)


def ascending(times: Iterable[float]) -> bool:
    """Whether ``times`` are finite, not below 0 and in order."""
    before = 0.0
    for time in times:
        if not before <= time < math.inf:  # crossings, positions below 0, nan and inf at once
            return False
        before = time
    return True


def differences(tau: Tensor) -> Tensor:
    """Each position minus the one before it, the first minus 0; differentiable, shape ``(n,)``."""
    return tau - F.pad(tau, (1, -1))  # in half the time of torch.diff with its gradient


def projected(tau: Tensor) -> Tensor:
    """Positions below 0 at 0, differentiable; one that stands at 0 exactly keeps its gradient.

    ``clamp(min=0)`` gives it none (in torch 2.15), and a particle that :meth:`TauAxis.project_` put there would stay.
    """
    return torch.where(tau < 0, torch.zeros_like(tau), tau)


def nonnegative(steps: Tensor) -> Tensor:
    """``steps`` of slots in order; on an accelerator, where the order is not read, none of them below 0."""
    return steps if steps.is_cpu else projected(steps)


def steps_by_slot(tau: Tensor) -> Tensor:
    """The step of the particle in each slot, in whatever order they are: its tau minus the next smaller one."""
    tau, slots = projected(tau), torch.arange(len(tau), device=tau.device)
    after, behind = tau[:, None], slots[:, None]
    rank = ((tau < after) | ((tau == after) & (slots < behind))).sum(1)  # as a stable sort has it; ONNX has none
    return tau - torch.where(rank == rank[:, None] - 1, tau, torch.zeros_like(tau)).sum(1)


def check_horizon(horizon: float | None, n: int) -> float:
    """The horizon as a float (``None`` is n), or an error that names it."""
    if horizon is None:
        return float(n)
    if isinstance(horizon, bool) or not isinstance(horizon, (int, float)):
        raise TypeError(f"horizon must be a positive number or None (= number of branches), got {horizon!r}")
    if not (math.isfinite(horizon) and horizon > 0):
        raise ValueError(f"horizon must be positive and finite, or None (= number of branches, {n}); got {horizon!r}")
    return float(horizon)


def check_positions(values: Tensor | Sequence[float], axis: TauAxis) -> Tensor:
    """``values`` as a tensor like ``axis.anchor``, positions below 0 projected to 0, or an error that names them."""
    n = axis.anchor.numel()
    tau = torch.as_tensor(values, dtype=axis.anchor.dtype, device=axis.anchor.device).detach()
    if tau.shape != (n,):
        raise ValueError(f"values must hold {n} positions, one for each branch; got shape {tuple(tau.shape)}")
    if not tau.is_meta and not bool(tau.isfinite().all()):
        raise ValueError(f"values must be finite, got {tau.tolist()}")
    return tau.clamp(min=0)


def check_tau_entries(state_dict: Mapping[str, Any], prefix: str) -> None:
    """Raise ``ValueError`` if a tau in ``state_dict`` under the layer's ``prefix`` is not finite."""
    for name in ("offset", "anchor"):
        key = f"{prefix}tau_axis.{name}"
        value = state_dict.get(key)
        if isinstance(value, Tensor) and value.layout != torch.strided:
            raise ValueError(f"state_dict[{key!r}] is {value.layout}; a tau is an ordinary (dense, strided) tensor")
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(whole(value).isfinite().all()):
            raise ValueError(f"state_dict[{key!r}] is not finite; the checkpoint is damaged, take an earlier one")


def plain_value(t: Tensor) -> Tensor | None:
    """``t`` as a tensor whose values can be read, or ``None`` where it has none (on meta, under ``vmap``)."""
    if torch.compiler.is_compiling():  # the compiler cannot trace these questions
        return t
    value = untransformed(t)
    return None if value is None or value.is_meta else value
