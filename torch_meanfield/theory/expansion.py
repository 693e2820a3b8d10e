r"""A deep residual network by powers of its horizon: the two-layer network is the lowest order, and here is the next.

With all steps times s, the output of eq. (15) is a function of s whose Taylor series at 0 is

.. math:: X^0 + s\sum_l \Delta_l f_l(X^0)
          + s^2\sum_{k<l} \Delta_k\Delta_l\,\nabla f_l(X^0) f_k(X^0) + O(s^3).

Order k has :math:`\binom nk` terms of size :math:`(T/n)^k`: it decays as :math:`T^k / k!`. Source: Lu et al. 2020,
section 2.2; the higher terms are what section 6.2 leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torch_meanfield.depth import MeanFieldSequential
from torch_meanfield.depth.euler import euler_step
from torch_meanfield.observe import private_copy
from torch_meanfield.theory.continuum import applied

HIGHEST = 4  # each order is a derivative of the one before, by two backward passes


def horizon_expansion(layer: MeanFieldSequential, x: Tensor, order: int = 2) -> tuple[Tensor, ...]:
    """The terms of a stack's output by powers of its horizon, exact for this stack.

    Args:
        layer: The stack, which runs in ``eval()`` on a copy.
        x: Its input, ``(B, ...)``.
        order: The highest power, at most 4; each costs some three times what the one before does.

    Returns:
        ``order + 1`` tensors shaped like ``x``; their sum approximates ``layer(x)``, the first two alone are a
        two-layer network. Of a stack with c times these steps, term k is c^k times as large.

    Raises:
        TypeError: ``layer`` is no ``MeanFieldSequential``.
        ValueError: Another solver than Euler's, an order out of range.

    Source: Lu et al. 2020, section 2.2.

    Example:
        >>> layer = MeanFieldSequential(*(nn.Linear(3, 3) for _ in range(2)), horizon=0.1).eval()
        >>> x = torch.randn(5, 3)
        >>> terms = horizon_expansion(layer, x, 2)  # linear blocks: two of them have no third order
        >>> bool(torch.allclose(sum(terms), layer(x), atol=1e-6))
        True
    """
    if not isinstance(layer, MeanFieldSequential):
        raise TypeError(f"layer must be a MeanFieldSequential, got {type(layer).__name__}")
    if layer.solver is not euler_step:
        raise ValueError("layer must take Euler steps, eq. (15); it has a solver of its own")
    if isinstance(order, bool) or not isinstance(order, int) or not 0 <= order <= HIGHEST:
        raise ValueError(f"order must be an integer of 0 .. {HIGHEST}, got {order!r}")
    copy: MeanFieldSequential = private_copy(layer)  # type: ignore[assignment]
    places = layer.tau_axis.read().clamp(min=0).argsort(stable=True).tolist()
    steps = layer.steps().detach().to(x.device, x.dtype)

    def output(s: Tensor) -> Tensor:
        state = x
        for place, step in zip(places, steps, strict=True):
            state = state + s * step * applied(copy[place], state)
        return state

    zero, one = x.new_zeros(()), x.new_ones(())
    terms: list[Tensor] = []
    derivative: Callable[[Tensor], Tensor] = output
    with torch.enable_grad():
        for k in range(order + 1):
            terms.append(derivative(zero).detach() / math.factorial(k))
            derivative = _slope(derivative, one)
    return tuple(terms)


def _slope(function: Callable[[Tensor], Tensor], one: Tensor) -> Callable[[Tensor], Tensor]:
    # not torch.func.jvp, whose first call in a process compiles a table with the deprecated torch.jit.script
    def slope(s: Tensor) -> Tensor:
        found: Tensor = torch.autograd.functional.jvp(function, s, one, create_graph=True)[1]  # type: ignore[no-untyped-call]
        return found

    return slope
