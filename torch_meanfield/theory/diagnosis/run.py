"""``diagnose``: one call on any network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_meanfield.observe import private_copy, tensors_in, undisturbed
from torch_meanfield.theory.diagnosis.advise import advise
from torch_meanfield.theory.diagnosis.blocks import measured, watching
from torch_meanfield.theory.diagnosis.kernel import kernel_of
from torch_meanfield.theory.diagnosis.parts import SKIP, Kernel, Layer
from torch_meanfield.theory.diagnosis.predict import Prediction, predict
from torch_meanfield.theory.diagnosis.record import Recorder, Trace, layers_of
from torch_meanfield.theory.diagnosis.report import Diagnosis

Loss = Callable[[Any], Tensor]
_READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def diagnose(
    model: nn.Module,
    batch: Tensor | tuple[Tensor, Tensor],
    *,
    loss: Loss | None = None,
    kernel_samples: int = 8,
    kernel_bytes: int = 2 << 30,
) -> Diagnosis:
    """What mean-field theory sees in a network on one batch: why it trains, or why it does not.

    One forward and backward pass in the mode the model is in, the tangent kernel on a few inputs in ``eval()``, and of
    mean-field stacks one forward pass without each block and a few adjoint ones for the price of each exchange.
    Measured in every layer: length q, correlation, gradients, dead and dormant units, potentials. Predicted from the
    layer's own weights, its activation and norm: chi, what a stack of such layers would do to gradients, and over which
    depth. See :class:`Layer` and :class:`Particles` for all columns.

    All work is done on a private copy: the model keeps its parameters, buffers, gradients, mode, hooks and (with it
    the process) its random state.

    Args:
        model: Any module that is called with one tensor.
        batch: Its input, the first dimension the batch's, or a pair of input and target as a ``DataLoader`` gives it.
        loss: Maps the model's output to a scalar. Without it: cross entropy for integer targets, mean squared error
            for floating-point ones, and a fixed random linear functional of the output where there is no target.
        kernel_samples: Number of inputs for the tangent kernel; 0 leaves it out.
        kernel_bytes: Memory it may take.

    Returns:
        Prints as a table; ``.plot()`` draws it.

    Raises:
        TypeError: ``model`` is no module, or ``batch`` neither a tensor nor a pair of tensors.
        ValueError: A batch of fewer than two inputs, parameters on several devices or on another one than the batch, no
            layer with weights, no parameter that requires a gradient, a model that cannot be copied.

    Source: Schoenholz et al. 2017; Yang et al. 2019; Lu et al. 2020; Rotskoff et al. 2019; Jacot et al. 2018.

    Example:
        >>> net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> found = diagnose(net, torch.randn(16, 6))
        >>> [layer.name for layer in found.layers]
        ['0', '2', '4']
    """
    x, target = _checked(model, batch, loss, kernel_samples)
    copy = private_copy(model)
    for mine, theirs in zip(copy.modules(), model.modules(), strict=True):
        mine.training = theirs.training
    for p in copy.parameters():
        p.grad = None
    with undisturbed(), torch.enable_grad():
        recorder = Recorder(copy, len(x))
        source = x.detach().clone().requires_grad_() if x.is_floating_point() else x
        with recorder.watching(), watching(copy) as stacks:
            output = copy(source.clone() if source.requires_grad else source)
        value, name = _loss(output, target, loss)
        if not value.requires_grad:
            raise ValueError(
                "the loss does not depend on any parameter that requires a gradient; is something detached, or "
                "rounded to integers, between them?"
            )
        value.backward(retain_graph=bool(stacks))  # type: ignore[no-untyped-call]
        traces = recorder.traces
        layers = [_layer(t, p) for t, p in zip(traces, predict(traces), strict=True)]
        buffers = [(b, b.clone()) for b in copy.buffers()]
        particles = measured(stacks, value, _first(output), name, lambda: _again(copy, x, target, loss))
        for buffer, before in buffers:  # running statistics, into which passes without a block went
            buffer.data.copy_(before)
        copy.zero_grad(set_to_none=True)
        kernel = Kernel(0, torch.empty(0, dtype=torch.float64, device="cpu"), "kernel_samples=0")
        if kernel_samples:
            kernel = kernel_of(copy, x[:kernel_samples], _first(output).detach(), kernel_bytes)
    findings = advise(layers, particles, kernel, value.item())
    return Diagnosis(
        type(model).__name__, len(x), value.item(), name, tuple(layers), particles, kernel, tuple(findings)
    )


def _checked(model: Any, batch: Any, loss: Any, kernel_samples: Any) -> tuple[Tensor, Tensor | None]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)
    if not pair and not isinstance(batch, Tensor):
        raise TypeError(f"batch must be a tensor, or a pair (input, target) of tensors, got {type(batch).__name__}")
    x, target = (batch[0], batch[1]) if pair else (batch, None)
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a callable of the model's output, got {loss!r}")
    if isinstance(kernel_samples, bool) or not isinstance(kernel_samples, int) or kernel_samples < 0:
        raise ValueError(f"kernel_samples must be an integer of at least 0, got {kernel_samples!r}")
    if x.ndim == 0 or len(x) < 2:
        raise ValueError(
            f"batch holds {len(x) if x.ndim else 0} input(s) (shape {tuple(x.shape)}); correlations need at least two"
        )
    if target is not None and len(target) != len(x):
        raise ValueError(f"batch holds {len(x)} inputs and {len(target)} targets; give one for each")
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        listed = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"the model's parameters are on several devices ({listed}); move it to one")
    if devices and x.device not in devices:
        raise ValueError(f"batch is on {x.device}, the model on {next(iter(devices))}; move one of them")
    if not layers_of(model):
        raise ValueError(
            f"{type(model).__name__} has no layer with weights: there is nothing to diagnose; pass the network "
            f"that holds them"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "the model has no parameter that requires a gradient: there is nothing to train; call "
            "requires_grad_(True) on what is to be diagnosed"
        )
    return x, target


def _loss(output: Any, target: Tensor | None, loss: Loss | None) -> tuple[Tensor, str]:
    if loss is not None:
        value = loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"loss must return a scalar tensor, got {value!r:.80}")
        return value.reshape(()), "given loss"
    out = _first(output)
    if target is None:
        # on the CPU, so that all devices see the same functional
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(out)
        return (out * direction).sum() / len(out), "random linear functional"
    if not target.is_floating_point():
        return F.cross_entropy(out, target), "cross entropy"
    if out.shape != target.shape:
        raise ValueError(f"the output has shape {tuple(out.shape)}, the target {tuple(target.shape)}; pass loss=")
    return F.mse_loss(out, target), "squared error"


def _first(output: Any) -> Tensor:
    found = [t for t in tensors_in(output) if t.is_floating_point()]
    if not found:
        raise ValueError(
            "the model's output holds no floating-point tensor to diagnose; wrap it in a module that returns one, "
            "such as the logits"
        )
    return found[0]


def _layer(trace: Trace, predicted: Prediction) -> Layer:
    gradient = math.nan if trace.gradient is None else math.sqrt(trace.gradient.item())
    measured = trace.output[0].item(), trace.output[1].item(), gradient
    if trace.skip:
        return Layer(trace.name, SKIP, *measured)
    gradients = [p.grad for p in trace.module.parameters() if p.grad is not None]
    weight_gradient = math.sqrt(sum(g.double().square().sum().item() for g in gradients)) if gradients else math.nan
    spread, extreme = _potentials(trace.module)
    return Layer(
        trace.name,
        type(trace.module).__name__,
        *measured,
        weight_gradient,
        trace.activation,
        trace.norm,
        math.nan if trace.dead is None else trace.dead.item(),
        math.nan if trace.dormant is None else trace.dormant.item(),
        predicted.chi,
        predicted.depth_scale,
        predicted.critical_gain,
        spread,
        extreme,
    )


def _potentials(module: nn.Module) -> tuple[float, float]:
    """Of the units a layer reads: V_i = sum_k a_ik dE/da_ik over its weights, as in ``width/potentials.py``."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, _READERS) or getattr(module, "groups", 1) != 1 or weight is None or weight.grad is None:
        return math.nan, math.nan
    v = (weight.detach() * weight.grad).transpose(0, 1).flatten(1).sum(1).double()
    if len(v) < 3:
        return math.nan, math.nan
    deviation = v.std().item()
    extreme = (v - v.mean()).abs().max().item() / deviation if deviation > 0 else 0.0
    return len(v) * deviation, extreme


def _again(copy: nn.Module, x: Tensor, target: Tensor | None, loss: Loss | None) -> Tensor:
    """The loss of another forward pass from the random state of the first."""
    with undisturbed():
        return _loss(copy(x.detach().clone()), target, loss)[0]
