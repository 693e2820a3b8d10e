"""One forward and backward pass of a private copy, watched: what each layer puts out, and what comes back to it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from torch_meanfield.observe import Call, Observer, tensors_in
from torch_meanfield.theory.activation import Activation

ACTIVATIONS = frozenset(
    "celu elu erf gelu hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish quick_gelu relu relu6 selu sigmoid "
    "silu softplus softsign tanh threshold".split()
)
NORMS = frozenset("batch_norm group_norm instance_norm layer_norm rms_norm".split())
DORMANT = 0.025  # of the layer's mean deviation; Sokar et al. 2023 use this share of the mean absolute activation


@dataclass(eq=False)
class Trace:
    """What was seen of one call of a layer.

    Attributes:
        name, module: The layer; of a skip connection's sum, the layer before it.
        skip: It is such a sum, a point of the residual stream.
        output: Statistics of its output: mean square, and mean product of two inputs' over it (0-d tensors).
        gradient: Squared norm of the gradient by its output, once the backward pass has come by.
        norm, activation: Names of what followed before the next layer.
        function: That activation as a callable of one tensor.
        read: Mean square of what the activation read.
        dead: Share of its units whose output is the same everywhere.
        dormant: Share of its units whose output hardly changes, the dead among them.
    """

    name: str
    module: nn.Module
    output: tuple[Tensor, Tensor]
    gradient: Tensor | None = None
    norm: str = ""
    activation: str = ""
    function: Activation | None = None
    read: Tensor | None = None
    skip: bool = False
    dead: Tensor | None = None
    dormant: Tensor | None = None


@dataclass(eq=False)
class Recorder:
    """Hooks on the layers of ``model``, and a watcher for an :class:`Observer` of its forward pass."""

    model: nn.Module
    batch: int
    traces: list[Trace] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    pending: Trace | None = None  # the last layer, until its activation has been seen

    @contextmanager
    def watching(self) -> Any:
        """Hooks for the time of the forward pass; gradients are caught by tensors, and need none."""
        handles = [
            module.register_forward_hook(self._layer_hook(name or type(module).__name__))
            for name, module in layers_of(self.model).items()
        ]
        try:
            with Observer(self._watch):
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def _layer_hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found = [t for t in tensors_in(output) if t.is_floating_point()]
            if not found:
                return
            out = found[0]
            count = self.calls[name] = self.calls.get(name, 0) + 1
            self.pending = self._trace(name if count == 1 else f"{name}[{count}]", module, out)

        return hook

    def _trace(self, name: str, module: nn.Module, out: Tensor, skip: bool = False) -> Trace:
        trace = Trace(name, module, self._statistics(out), skip=skip)
        self.traces.append(trace)
        if out.requires_grad:
            cast(Any, out).register_hook(lambda g: setattr(trace, "gradient", _norm(g).square()))
        return trace

    def _watch(self, call: Call) -> None:
        """Note the norm and the activation that follow the last layer, and the sums of skip connections."""
        trace, name = self.pending, call.name.rstrip("_")
        if self.traces and name in ("add", "addcmul") and self._joins(call):
            self.pending = None
            before = self.traces[-1]
            if before.skip:  # the sum of three
                self.traces.pop()
            self._trace(before.name if before.skip else f"{before.name} +", before.module, call.result, skip=True)
            return
        if trace is None or not isinstance(call.result, Tensor) or not call.args:
            return
        with torch.no_grad():
            if name in NORMS and not trace.norm:
                trace.norm, trace.read = name, _square(call.result)
            elif name in ACTIVATIONS:
                rest, options, func = call.args[1:], dict(call.kwargs), call.func
                trace.activation = name
                if not any(isinstance(v, Tensor) for v in (*rest, *options.values())):
                    trace.function = lambda u: func(u, *rest, **options)
                trace.dead, trace.dormant = self._silent(call.result)
                self.pending = None

    def _joins(self, call: Call) -> bool:
        """Two tensors of one shape, both of which a gradient goes back through: x + f(x)."""
        parts, out = [a for a in call.args[:2] if isinstance(a, Tensor)], call.result
        return (
            isinstance(out, Tensor)
            and len(parts) == 2
            and out.is_floating_point()
            and out.ndim >= 2
            and out.shape[0] == self.batch
            and all(a.shape == out.shape and a.requires_grad and not a.is_leaf for a in parts)
        )

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            q = _square(x)
            if x.ndim < 2 or x.shape[0] != self.batch or self.batch < 2:
                return q, torch.full_like(q, torch.nan)
            n, total = self.batch, x.detach().sum(0, dtype=_wide(x)).square().sum()
            squares = q * x.numel()
            return q, (total - squares) / (n - 1) / squares

    def _silent(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The dead share and the dormant one.

        Units are channels of feature maps (dimension 1 of 4 or 5) and entries of the last dimension elsewhere.
        """
        if x.ndim < 2 or x.shape[0] != self.batch:
            return None, None
        unit = 1 if x.ndim in (4, 5) and x.shape[-1] != x.shape[1] else x.ndim - 1
        unit = 1 if x.ndim in (4, 5) and _channels_first(self.traces[-1].module) else unit
        others = [d for d in range(x.ndim) if d != unit]
        x = x.detach()
        dead = x.amax(others) == x.amin(others)
        spread = x.to(_wide(x)).std(others, correction=0)
        return dead.float().mean(), (dead | (spread <= DORMANT * spread.mean())).float().mean()


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with a weight matrix (or kernel) of their own, by name; failing that, with any such parameter."""
    named = dict(model.named_modules())
    weighted = {name: m for name, m in named.items() if _has_weight(m)}
    if weighted:
        return weighted
    return {name: m for name, m in named.items() if any(p.ndim >= 2 for p in m.parameters(recurse=False))}


def _has_weight(module: nn.Module) -> bool:
    if hasattr(module, "normalized_shape"):  # a layer norm over several dimensions
        return False
    weights = (getattr(module, name, None) for name in ("weight", "in_proj_weight", "weight_hh_l0", "weight_hh"))
    return any(isinstance(w, Tensor) and w.ndim >= 2 for w in weights)


def _channels_first(module: nn.Module) -> bool:
    return type(module).__name__.startswith("Conv") or hasattr(module, "in_channels")


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x.detach(), dtype=_wide(x))
    return norm


def _square(x: Tensor) -> Tensor:
    return _norm(x).square() / x.numel()
