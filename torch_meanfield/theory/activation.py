"""Activations as the theory takes them: callables that act on every number alone, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


def elementwise(activation: Activation) -> Activation:
    """``activation``, proven on a probe to be element-wise in float64; one that writes into its input is given a copy.

    Raises:
        TypeError: It is not callable, cannot take float64, or does not return a tensor.
        ValueError: An entry of its output depends on other entries, or on chance.
    """
    name = name_of(activation)
    if not callable(activation):
        raise TypeError(f"activation must be a callable such as torch.tanh or nn.ReLU(), got {activation!r}")
    probe = torch.linspace(-3.1, 2.9, 24, dtype=torch.float64).reshape(4, 6)
    given = probe.clone()
    with torch.no_grad():
        try:
            whole = activation(given)
            part = activation(probe[::2, 1::3].clone())
            flat = activation(probe.flatten().clone())
        except Exception as error:
            raise TypeError(
                f"activation {name} cannot be applied to a float64 tensor ({type(error).__name__}: {error}); a module "
                f"with parameters needs .double()"
            ) from error
    if not all(isinstance(t, Tensor) for t in (whole, part, flat)):
        raise TypeError(f"activation {name} must return a tensor, got {type(whole).__name__}")
    alike = whole.shape == probe.shape and part.shape == (2, 2) and flat.shape == (24,)
    # Up to rounding: vectorised code and its remainder differ in the last bit for some (Softplus).
    if not (alike and _same(whole[::2, 1::3], part) and _same(whole.flatten(), flat)):
        raise ValueError(
            f"activation {name} is not element-wise (its output for one number depends on others, or on chance); "
            f"softmax, normalisation, pooling, GLU and dropout have no length map: pass what acts on each number alone"
        )
    if torch.equal(given, probe):
        return activation
    return lambda u: activation(u.clone())  # an in-place activation


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


def derivative(activation: Activation, u: Tensor) -> Tensor:
    """phi'(u), in the shape of ``u``; differentiable where ``u`` is. Zero where phi is piecewise constant."""
    return value_and_derivative(activation, u)[1]


def value_and_derivative(activation: Activation, u: Tensor) -> tuple[Tensor, Tensor]:
    """phi(u) and phi'(u) with one evaluation."""
    with torch.enable_grad():
        v = u if u.requires_grad else u.detach().requires_grad_()
        out = activation(v)
        if not out.requires_grad:
            return out, torch.zeros_like(u)
        (slope,) = torch.autograd.grad(out.sum(), v, create_graph=u.requires_grad)
    if u.requires_grad:
        return out, slope
    return out.detach(), slope


def name_of(activation: Any) -> str:
    """What to call it in an error."""
    return cast(str, getattr(activation, "__name__", None) or type(activation).__name__)
