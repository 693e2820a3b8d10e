"""What the theory predicts of each layer: chi, a depth scale, and the gain that would make it critical."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_meanfield.theory.activation import Activation, derivative, elementwise
from torch_meanfield.theory.diagnosis.record import Trace
from torch_meanfield.theory.gaussian import expect
from torch_meanfield.theory.phase import phase


@dataclass(frozen=True)
class Prediction:
    """See the attributes of the same names of :class:`~torch_meanfield.theory.diagnosis.Layer`."""

    chi: float = math.nan
    depth_scale: float = math.nan
    critical_gain: float = math.nan


def predict(traces: Sequence[Trace]) -> list[Prediction]:
    """One prediction for each trace, all layers with one activation in one go."""
    out = [Prediction() for _ in traces]
    groups: dict[str, list[int]] = {}
    for i, trace in enumerate(traces):
        if not trace.skip and trace.function is not None and _deviations(trace.module) is not None:
            groups.setdefault(trace.activation, []).append(i)
    with torch.device("cpu"):  # whatever the default device
        _fill(out, groups, traces)
    return out


def _fill(out: list[Prediction], groups: dict[str, list[int]], traces: Sequence[Trace]) -> None:
    for indices in groups.values():
        try:
            phi = elementwise(_first(traces[indices[0]]))
        except (TypeError, ValueError):
            continue
        plain = [i for i in indices if not traces[i].norm]
        normed = [i for i in indices if traces[i].norm]
        for i, p in zip(plain, _plain(phi, [traces[i] for i in plain]), strict=True):
            out[i] = p
        for i, p in zip(normed, _normed(phi, [traces[i] for i in normed]), strict=True):
            out[i] = p


def _first(trace: Trace) -> Activation:
    assert trace.function is not None
    return trace.function


def _plain(phi: Activation, traces: list[Trace]) -> list[Prediction]:
    """chi at the measured length; over which depth a stack of such layers loses correlations (xi_c) or gradients."""
    if not traces:
        return []
    q = _clean([t.output[0] for t in traces])
    deviations = [_deviations(t.module) or (0.0, 0.0) for t in traces]
    w, b = (torch.tensor(column, dtype=torch.float64) for column in zip(*deviations, strict=True))
    chi = w.square() * expect(lambda u: derivative(phi, u).square(), q)
    scales = phase(phi, w, b, q=q).xi_c
    return [
        Prediction(c, min(s, _scale(c)), c**-0.5 if c > 0 else math.nan)
        for c, s in zip(chi.tolist(), scales.tolist(), strict=True)
    ]


def _normed(phi: Activation, traces: list[Trace]) -> list[Prediction]:
    """Batch norm divides by the spread over the batch, the others by the length (Yang et al. 2019)."""
    if not traces:
        return []
    q = _clean([t.read if t.read is not None else t.output[0] for t in traces])
    slope, second = expect(lambda u: derivative(phi, u).square(), q), expect(lambda u: phi(u).square(), q)
    over_batch = torch.tensor([t.norm in ("batch_norm", "instance_norm") for t in traces])
    chi = q * slope / torch.where(over_batch, second - expect(phi, q).square(), second)
    return [Prediction(c, _scale(c)) for c in chi.tolist()]


def _scale(chi: float) -> float:
    if chi <= 0:
        return 0.0
    return 1 / abs(math.log(chi)) if abs(chi - 1) > 1e-9 else math.inf


def _clean(lengths: list[Tensor]) -> Tensor:
    """Lengths that the integrals can take; what is not finite is found and named elsewhere."""
    return torch.stack([v.double().cpu() for v in lengths]).nan_to_num(1.0, 1e12, 1.0).clamp(1e-12, 1e12)


def _deviations(module: nn.Module) -> tuple[float, float] | None:
    """sigma_w (times the root of the fan-in) and sigma_b of a linear or convolutional layer."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2 or isinstance(module, nn.Embedding):
        return None
    w = math.sqrt(weight[0].numel() * weight.detach().double().square().mean().item())
    b = math.sqrt(bias.detach().double().square().mean().item()) if isinstance(bias, Tensor) else 0.0
    return (w, b) if math.isfinite(w) and math.isfinite(b) else None
