r"""Residual networks at initialisation: lengths, correlations and gradients when every branch is an Euler step.

The stack is that of the depth wing, :math:`X^l = X^{l-1} + \delta_l f(X^{l-1}, \theta^l)` with steps
:math:`\delta_l = \tau^l - \tau^{l-1}`. Independent branches add variances, so a step enters squared: n steps of 1 / n
add 1 / n of what n steps of 1 add, to lengths and to the logarithm of gradients alike.

Source: Yang and Schoenholz 2017 (arXiv:1712.08969), Theorems 5, 6 and 12 (there every step is 1), and Yang et al. 2019
(arXiv:1902.08129) for the branches with batch norm; Lu et al. 2020, eq. (15), for the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_meanfield.theory.activation import Activation, elementwise
from torch_meanfield.theory.batch_norm import batch_norm_gradient_growth
from torch_meanfield.theory.phase import squared_slope
from torch_meanfield.theory.signal import Number, checked, checked_correlation, cross_moment, double, second_moment


@dataclass(frozen=True, eq=False)
class ResidualPropagation:
    """Predicted lengths, correlations and gradients along a residual stack; float64 ``(n + 1,)`` each.

    Attributes:
        p: Mean square of the entries of X^l, from X^0 on.
        c: Correlation of X^l for two inputs.
        gradient: Squared norm of the loss's gradient at X^l over that at X^n; its last entry is 1.
    """

    p: Tensor
    c: Tensor
    gradient: Tensor


def residual_propagation(
    activation: Activation,
    steps: Tensor | Sequence[float],
    sigma_w: Number,
    sigma_b: Number = 0.0,
    *,
    sigma_v: Number = 1.0,
    sigma_a: Number = 0.0,
    p: Number = 1.0,
    c: Number = 0.0,
) -> ResidualPropagation:
    r"""Branches :math:`f(x) = V\phi(W x + b) + a`, fully connected.

    .. math::
        q &= \sigma_w^2 p^{l-1} + \sigma_b^2, \qquad
        p^l = p^{l-1} + \delta_l^2 \left(\sigma_v^2 E[\phi(\sqrt q z)^2] + \sigma_a^2\right) \\
        \gamma^l &= \gamma^{l-1} + \delta_l^2 \left(\sigma_v^2 E[\phi(u_1)\phi(u_2)] + \sigma_a^2\right), \qquad
        c^l = \gamma^l / p^l \\
        \chi^{l-1} &= \chi^l \left(1 + \delta_l^2 \sigma_v^2 \sigma_w^2 E[\phi'(\sqrt q z)^2]\right)

    With steps of 1, tanh lengths grow linearly and gradients like :math:`e^{k \sqrt l}`, ReLU lengths and gradients
    exponentially; with steps of 1 / n both stay where they were.

    Args:
        activation: Any element-wise callable.
        steps: The n step sizes, not negative, such as ``layer.steps()`` of a
            :class:`~torch_meanfield.MeanFieldSequential`.
        sigma_w, sigma_b: Standard deviations of W (times the root of its inputs) and b.
        sigma_v, sigma_a: The same of V and a.
        p, c: Mean square of the entries of X^0 and its correlation for two inputs.

    Raises:
        ValueError: A negative step, variance or deviation, or an activation that is not element-wise.

    Source: Yang and Schoenholz 2017, Theorems 5, 6 and 12.

    Example:
        >>> [round(v, 6) for v in residual_propagation(torch.relu, [1.0, 1.0], 2**0.5).p.tolist()]
        [1.0, 2.0, 4.0]
    """
    phi = elementwise(activation)
    deltas = _checked_steps(steps)
    w, b, v, a, length = checked(sigma_w=sigma_w, sigma_b=sigma_b, sigma_v=sigma_v, sigma_a=sigma_a, p=p)
    rho = checked_correlation(c)
    product = rho * length
    lengths, products, gains = [length], [product], []
    for delta in deltas:
        q = w.square() * length + b.square()
        rho_q = ((w.square() * product + b.square()) / q.clamp_min(1e-300)).clamp(-1, 1)
        gains.append(1 + (delta * v * w).square() * squared_slope(phi, q))
        length = length + delta.square() * (v.square() * second_moment(phi, q) + a.square())
        product = product + delta.square() * (v.square() * cross_moment(phi, q, q, rho_q) + a.square())
        lengths.append(length)
        products.append(product)
    return _result(lengths, products, gains)


def normalized_residual_propagation(
    activation: Activation,
    steps: Tensor | Sequence[float],
    *,
    layers: int = 2,
    variance: Number = 2.0,
    gain: Number = 2.0,
    p: Number = 1.0,
    c: Number = 0.0,
) -> ResidualPropagation:
    r"""Pre-activation branches with batch norm, (BN, phi, W) repeated: those of a ``MeanFieldResNet``.

    Batch norm gives every branch an input of length 1, so its output has the same variance v in all layers:

    .. math:: p^l = p^{l-1} + \delta_l^2 v, \qquad
              \chi^{l-1} = \chi^l \left(1 + \delta_l^2\,\frac{g}{p^{l-1} - \gamma^{l-1}}\right), \qquad
              g = \sigma_W'^2\, E[\phi'^2] \left(\frac{E[\phi'^2]}{\mathrm{Var}\,\phi}\right)^{k - 1}

    for k layers, :math:`v = \sigma_W^2 E[\phi^2]`, and :math:`\gamma^l`, the product of two inputs, growing by
    :math:`\delta_l^2 \sigma_W^2 E[\phi]^2`: batch norm divides by the spread :math:`p - \gamma`, not by p. All in the
    limit of large batches and width. With steps of 1 lengths grow linearly and gradients like a
    power of the depth, where the same layers without the identity path grow exponentially.

    Args:
        activation: Any element-wise callable.
        steps: The n step sizes, not negative.
        layers: k, the number of (BN, phi, W) in a branch, at least 1.
        variance: :math:`\sigma_W^2`, by which the last layer multiplies the mean square of what it reads: fan-in times
            the variance of its weights; 2 for square layers after He et al. 2015.
        gain: :math:`\sigma_W'^2`, the same going backwards: fan-out times the variance of the weights.
        p, c: Mean square and correlation of the entries of X^0.

    Raises:
        ValueError: A negative step or variance, no layers, or an activation that is not element-wise.

    Source: Yang et al. 2019, section 3 with Appendix on residual networks; Yang and Schoenholz 2017 for the recurrence.
    """
    phi = elementwise(activation)
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        raise ValueError(f"layers must be an integer of at least 1, got {layers!r}")
    deltas = _checked_steps(steps)
    forward, backward, length = checked(variance=variance, gain=gain, p=p)
    one = torch.ones((), dtype=torch.float64)
    second = second_moment(phi, one)
    spread_gain = squared_slope(phi, one) * backward * batch_norm_gradient_growth(phi) ** (layers - 1)
    zero = torch.zeros_like(one)
    mean = cross_moment(phi, one, one, zero)  # E[phi]^2: two inputs, normalised over a large batch, are uncorrelated
    product = checked_correlation(c) * length
    lengths, products, gains = [length], [product], []
    for delta in deltas:
        gains.append(1 + delta.square() * spread_gain / (length - product))
        length = length + delta.square() * forward * second
        product = product + delta.square() * forward * mean
        lengths.append(length)
        products.append(product)
    return _result(lengths, products, gains)


def _result(lengths: list[Tensor], products: list[Tensor], gains: list[Tensor]) -> ResidualPropagation:
    p, product = torch.stack(lengths), torch.stack(products)
    if not gains:
        return ResidualPropagation(p, product / p, torch.ones_like(p))
    from_the_end = torch.stack(gains).flip(0).cumprod(0).flip(0)
    return ResidualPropagation(p, product / p, torch.cat([from_the_end, torch.ones_like(from_the_end[:1])]))


def _checked_steps(steps: Tensor | Sequence[float]) -> Tensor:
    t = double(steps)
    if t.ndim != 1 or not bool((t.isfinite() & (t >= 0)).all()):
        raise ValueError(f"steps must be a list of finite step sizes, none below 0, got {steps!r:.200}")
    return t
