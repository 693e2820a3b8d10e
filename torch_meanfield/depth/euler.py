"""One Euler step of eq. (15): ``x + dtau * f(x)``, with dtau folded into the branch's last weight where it can be."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_meanfield._torch import convolve, is_called_plainly

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


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
    plan = _foldable(branch)
    if plan is None:
        out: Tensor = branch(x)
        _check_shape(x, out)
        if x.dtype == out.dtype == step.dtype:
            return torch.addcmul(x, out, step)
        # Narrow activations: multiply in the step's precision and round once. A bfloat16 step would be off by 0.4 %.
        return x + (out.to(step.dtype) * step).to(out.dtype)
    body, last = plan
    h = x
    for module in body:
        h = module(h)
    weight = _scale(last.weight, step)
    bias = None if last.bias is None else _scale(last.bias, step)
    update: Tensor = F.linear(h, weight, bias) if isinstance(last, nn.Linear) else convolve(last, h, weight, bias)
    _check_shape(x, update)
    return x + update


def _scale(t: Tensor, step: Tensor) -> Tensor:
    return t * step if t.dtype == step.dtype else (t.to(step.dtype) * step).to(t.dtype)


def _check_shape(x: Tensor, out: Tensor) -> None:
    if x.shape != out.shape:
        raise ValueError(
            f"a residual branch must keep the shape of its input, {tuple(x.shape)}; got {tuple(out.shape)}"
        )


def _foldable(branch: nn.Module) -> tuple[list[nn.Module], nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear] | None:
    """The modules before the last affine layer, and that layer; ``None`` where the branch must be called whole.

    Hooks on a module that would be bypassed must still fire, and one that was compiled by ``Module.compile`` must run
    compiled, so such a branch or last layer is called whole.
    """
    body: list[nn.Module] = []
    last = branch
    while type(last).forward is nn.Sequential.forward:
        children = list(last.children())
        if not children or not is_called_plainly(last):
            return None
        body += children[:-1]
        last = children[-1]
    # exact types: a subclass or a parametrised layer may give its weight another meaning
    if (type(last) in _CONVS or type(last) is nn.Linear) and is_called_plainly(last):
        return body, last  # type: ignore[return-value]
    return None
