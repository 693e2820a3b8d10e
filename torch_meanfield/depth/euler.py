"""Euler steps of eq. (15): ``x + dtau * f(x)``, with dtau folded into the branch's last weight where it can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_meanfield._torch import children_of, convolve, is_called_plainly, is_watched, multiplied, parameters_of

# What torch makes of these classes; programs that patch ``nn.Linear.forward`` give it another meaning.
_AFFINE: dict[type, Any] = {kind: kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}
_SEQUENTIAL = nn.Sequential.forward
_FLOATS = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
_WRAPPERS = ("torch._subclasses", "torch.distributed")  # tensor classes that stand for the plain tensors behind them
Affine = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear

# Entries up to which the scaled weights of all branches are made at once: a call for each is then the larger cost, and
# what they take in memory until the backward pass is small.
SMALL = 2**16


def euler_step(x: Tensor, branch: nn.Module, step: Tensor) -> Tensor:
    """``x + step * branch(x)``, eq. (15) of Lu et al. 2020 for one particle.

    A branch that is an ``nn.Sequential`` ending in a convolution or a linear layer (or is one itself) is computed
    with that layer's weight and bias times ``step``, which is the same in algebra and costs a pass over weights
    instead of one over activations. Any other branch goes through ``addcmul``: one with hooks or a forward of its own
    there, or whose weights are no plain real tensors (complex, sparse, quantised, of a tensor subclass). At
    ``step == 1`` both give the bits of ``x + branch(x)``.

    Args:
        x: residual stream, any shape.
        branch: maps x to a tensor of x's shape.
        step: the step size dtau, a tensor of shape ``()`` in float32 or float64.

    Raises:
        ValueError: the branch's output has another shape than x (plain addition might broadcast it silently).
        TypeError: its output is no tensor.
    """
    return euler_steps(x, (branch,), (step,))


def euler_steps(x: Tensor, branches: Sequence[nn.Module], steps: Sequence[Tensor]) -> Tensor:
    """:func:`euler_step` by each of ``branches``, one behind the other, with the same bits."""
    plans = [_foldable(branch) for branch in branches]
    scaled = _scaled_at_once(plans, steps) if len(steps) > 1 else {}
    for i, (branch, step, plan) in enumerate(zip(branches, steps, plans, strict=True)):
        if plan is None:
            x = _unfolded(x, checked(x, branch(x), branch, i), step)
            continue
        body, last = plan
        h = x
        for module in body:
            h = module(h)
        weight, bias = scaled.get(i) or (
            scaled_by(last.weight, step),
            None if last.bias is None else scaled_by(last.bias, step),
        )
        update = F.linear(h, weight, bias) if isinstance(last, nn.Linear) else convolve(last, h, weight, bias)
        x = x + checked(x, update, branch, i)
    return x


def _unfolded(x: Tensor, out: Tensor, step: Tensor) -> Tensor:
    if x.dtype == out.dtype == step.dtype:
        return torch.addcmul(x, out, step)
    return x + scaled_by(out, step)


def scaled_by(t: Tensor, step: Tensor) -> Tensor:
    """``t * step``; of narrow floats in the precision of ``step``, rounded once: a bfloat16 step is off by 0.4 %."""
    if t.is_floating_point() and t.dtype.itemsize < step.dtype.itemsize:
        return (t.to(step.dtype) * step).to(t.dtype)
    return t * step


def is_plain(t: Tensor | None) -> bool:
    """Whether ``t`` is an ordinary dense tensor of real numbers that can be multiplied (or ``None``)."""
    if t is None:
        return True
    if t.dtype not in _FLOATS or t.layout != torch.strided:
        return False
    kind = type(t)
    return kind is nn.Parameter or kind is Tensor or kind.__module__.startswith(_WRAPPERS)


def _scaled_at_once(
    plans: Sequence[tuple[list[nn.Module], Affine] | None], steps: Sequence[Tensor]
) -> dict[int, tuple[Tensor, Tensor | None]]:
    """The scaled weight and bias of branch i, for those that are small and plain; made in one call."""
    # the compiler fuses better, the others may not know what to make of it
    if torch.compiler.is_compiling() or is_watched() or cast(Any, torch).jit.is_tracing():
        return {}
    tensors: list[Tensor] = []
    factors: list[Tensor] = []
    held: list[tuple[int, bool]] = []
    for i, (plan, step) in enumerate(zip(plans, steps, strict=True)):
        if plan is None:
            continue
        own = parameters_of(plan[1])
        weight, bias = own.get("weight"), own.get("bias")
        if type(weight) is nn.Parameter and weight.dtype == step.dtype and weight.numel() <= SMALL:
            held.append((i, bias is not None))
            tensors += (weight,) if bias is None else (bias, weight)
            factors += (step,) if bias is None else (step, step)
    out = iter(multiplied(tensors, factors) if tensors else ())
    scaled: dict[int, tuple[Tensor, Tensor | None]] = {}
    for i, with_bias in held:
        scaled_bias = next(out) if with_bias else None
        scaled[i] = (next(out), scaled_bias)
    return scaled


def checked(x: Tensor, out: Any, branch: nn.Module, i: int) -> Tensor:
    """``out``, what the i-th branch to run has put out, if it can be added to ``x``."""
    if not isinstance(out, Tensor):
        raise TypeError(
            f"residual branch {i} ({type(branch).__name__}) must return one tensor, got a {type(out).__name__}; wrap "
            f"it in a module that returns the tensor to add alone"
        )
    if x.shape != out.shape:
        raise ValueError(
            f"a residual branch must keep the shape of its input, {tuple(x.shape)}; got {tuple(out.shape)} from "
            f"branch {i} ({type(branch).__name__})"
        )
    return out


def _foldable(branch: nn.Module) -> tuple[list[nn.Module], Affine] | None:
    """The modules before the last affine layer, and that layer; ``None`` where the branch must be called whole.

    Hooks on a module that would be bypassed must still fire, one that was compiled by ``Module.compile`` must run
    compiled, and a forward of an instance's or a program's own must be run, so such a branch or layer is called whole.
    """
    body: list[nn.Module] = []
    last = branch
    while type(last).forward is _SEQUENTIAL and cast(Any, type(last)).__iter__ is nn.Sequential.__iter__:
        children = list(children_of(last).values())
        if not children or None in children or not is_called_plainly(last):
            return None
        body += children[:-1]  # type: ignore[arg-type]
        last = children[-1]  # type: ignore[assignment]
    # exact types: a subclass or a parametrised layer may give its weight another meaning
    kind = type(last)
    if _AFFINE.get(kind) is not kind.forward or not is_called_plainly(last):
        return None
    own = parameters_of(last)  # not by slow attributes
    weight = own["weight"] if "weight" in own else cast(Any, last.weight)
    bias = own["bias"] if "bias" in own else cast(Any, last.bias)
    return (body, cast(Affine, last)) if is_plain(weight) and is_plain(bias) else None
