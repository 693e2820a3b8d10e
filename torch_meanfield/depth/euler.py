"""Euler steps of eq. (15): ``x + dtau * f(x)``, with dtau folded into the branch's last weight where it can be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_meanfield._torch import children_of, convolve, is_called_plainly, is_watched, multiplied, parameters_of

_AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Affine = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear

# Entries up to which the scaled weights of all branches are made at once: a call for each is then the larger cost, and
# what they take in memory until the backward pass is small.
SMALL = 2**16


def euler_step(x: Tensor, branch: nn.Module, step: Tensor) -> Tensor:
    """``x + step * branch(x)``, eq. (15) of Lu et al. 2020 for one particle.

    A branch that is an ``nn.Sequential`` ending in a convolution or a linear layer (or is one itself) is computed
    with that layer's weight and bias times ``step``, which is the same in algebra and costs a pass over weights
    instead of one over activations. Any other branch goes through ``addcmul``. At ``step == 1`` both give the bits of
    ``x + branch(x)``.

    Args:
        x: residual stream, any shape.
        branch: maps x to a tensor of x's shape.
        step: the step size dtau, a tensor of shape ``()`` in float32 or float64.

    Raises:
        ValueError: the branch's output has another shape than x (plain addition might broadcast it silently).
    """
    return euler_steps(x, (branch,), (step,))


def euler_steps(x: Tensor, branches: Sequence[nn.Module], steps: Sequence[Tensor]) -> Tensor:
    """:func:`euler_step` by each of ``branches``, one behind the other, with the same bits."""
    plans = [_foldable(branch) for branch in branches]
    scaled = _scaled_at_once(plans, steps) if len(steps) > 1 else {}
    for i, (branch, step, plan) in enumerate(zip(branches, steps, plans, strict=True)):
        if plan is None:
            x = _unfolded(x, branch(x), step)
            continue
        body, last = plan
        h = x
        for module in body:
            h = module(h)
        weight, bias = scaled.get(i) or (
            _scale(last.weight, step),
            None if last.bias is None else _scale(last.bias, step),
        )
        update = F.linear(h, weight, bias) if isinstance(last, nn.Linear) else convolve(last, h, weight, bias)
        _check_shape(x, update)
        x = x + update
    return x


def _unfolded(x: Tensor, out: Tensor, step: Tensor) -> Tensor:
    _check_shape(x, out)
    if x.dtype == out.dtype == step.dtype:
        return torch.addcmul(x, out, step)
    # Narrow activations: multiply in the step's precision and round once. A bfloat16 step would be off by 0.4 %.
    return x + (out.to(step.dtype) * step).to(out.dtype)


def _scale(t: Tensor, step: Tensor) -> Tensor:
    return t * step if t.dtype == step.dtype else (t.to(step.dtype) * step).to(t.dtype)


def _scaled_at_once(
    plans: Sequence[tuple[list[nn.Module], Affine] | None], steps: Sequence[Tensor]
) -> dict[int, tuple[Tensor, Tensor | None]]:
    """The scaled weight and bias of branch i, for those that are small and plain; made in one call."""
    if torch.compiler.is_compiling() or is_watched():  # the one fuses better, the other may not know what to make of it
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


def _check_shape(x: Tensor, out: Tensor) -> None:
    if x.shape != out.shape:
        raise ValueError(
            f"a residual branch must keep the shape of its input, {tuple(x.shape)}; got {tuple(out.shape)}"
        )


def _foldable(branch: nn.Module) -> tuple[list[nn.Module], Affine] | None:
    """The modules before the last affine layer, and that layer; ``None`` where the branch must be called whole.

    Hooks on a module that would be bypassed must still fire, and one that was compiled by ``Module.compile`` must run
    compiled, so such a branch or last layer is called whole.
    """
    body: list[nn.Module] = []
    last = branch
    while type(last).forward is nn.Sequential.forward:
        children = list(children_of(last).values())
        if not children or None in children or not is_called_plainly(last):
            return None
        body += children[:-1]  # type: ignore[arg-type]
        last = children[-1]  # type: ignore[assignment]
    # exact types: a subclass or a parametrised layer may give its weight another meaning
    return (body, last) if type(last) in _AFFINE and is_called_plainly(last) else None  # type: ignore[return-value]
