r"""Statistics of the Fisher information matrix of wide random networks, predicted and measured.

The network has layers of widths :math:`M_0, \dots, M_L`: :math:`u^l = W^l h^{l-1} + b^l`, :math:`h^l = \phi(u^l)`, a
linear output of C = :math:`M_L` units, weights of variance :math:`\sigma_w^2 / M_{l-1}`, biases of variance
:math:`\sigma_b^2`. Its Fisher information for Gaussian outputs, over T inputs, is the P x P matrix

.. math:: F = \frac1T \sum_t \sum_k \nabla_\theta f_k(x_t)\,\nabla_\theta f_k(x_t)^T.

Its nonzero eigenvalues are those of the tangent kernel divided by T, which is C T x C T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_meanfield.theory.activation import Activation, derivative, elementwise
from torch_meanfield.theory.gaussian import expect, expect_pair
from torch_meanfield.theory.ntk import empirical_ntk


@dataclass(frozen=True)
class FisherStatistics:
    """Of the eigenvalues of a Fisher information matrix, zeros included.

    Attributes:
        mean: Trace / P.
        second_moment: Sum of squares / P.
        largest: The largest eigenvalue.
    """

    mean: float
    second_moment: float
    largest: float

    @property
    def critical_learning_rate(self) -> float:
        """2 / largest: gradient descent on the squared loss with a larger step leaves a minimum there."""
        return 2 / self.largest


def predicted_fisher(
    activation: Activation,
    widths: Sequence[int],
    sigma_w: float,
    sigma_b: float = 0.0,
    *,
    samples: int,
    input_variance: float = 1.0,
) -> FisherStatistics:
    r"""What mean-field theory predicts for independent centred inputs.

    .. math::
        m_\lambda = \frac{C T_1}{P}, \quad
        s_\lambda = \frac{C}{P}\left(\frac{T-1}{T} T_2^2 + \frac1T T_1^2\right), \quad
        \lambda_{\max} = \frac{T-1}{T} T_2 + \frac1T T_1, \qquad
        T_r = \sum_{l=1}^L \tilde q_r^l\,(M_{l-1} \hat q_r^{l-1} + 1)

    where :math:`\hat q_1` and :math:`\hat q_2` are the mean squares of activations and the mean products of those of
    two inputs, :math:`\tilde q_1` and :math:`\tilde q_2` those of the back-propagated gradients. With :math:`T_r =
    M\alpha\kappa_r` and :math:`P = \alpha M^2` these are the theorems' :math:`\kappa_1 C/M`,
    :math:`\alpha(\frac{T-1}{T}\kappa_2^2 + \frac{1}{T}\kappa_1^2) C` and :math:`\alpha(\frac{T-1}{T}\kappa_2 +
    \frac1T\kappa_1) M`; the 1 beside :math:`M_{l-1}` counts the biases and is lost in their limit. The largest
    eigenvalue is C-fold in that limit.

    Args:
        activation: Any element-wise callable.
        widths: :math:`M_0, \dots, M_L`; at least one hidden layer.
        sigma_w, sigma_b: Standard deviations, at least 0.
        samples: T.
        input_variance: Variance of each coordinate of the inputs.

    Raises:
        TypeError, ValueError: A number out of its range, an activation that is not element-wise.

    Source: Karakida, Akaho, Amari 2019 (arXiv:1806.01316), theorems 1 to 3.

    Example:
        >>> found = predicted_fisher(torch.relu, [1000, 1000, 1], 2**0.5, samples=100)
        >>> round(found.mean * 1_002_001)  # the trace: a thousand from either layer, and two for the biases
        2002
    """
    phi = elementwise(activation)
    if len(widths) < 3 or any(not isinstance(m, int) or m < 1 for m in widths):
        raise ValueError(f"widths must be at least three positive integers (input, hidden, output), got {list(widths)}")
    if not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be a positive integer, got {samples!r}")
    for name, value in (("sigma_w", sigma_w), ("sigma_b", sigma_b), ("input_variance", input_variance)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
    own, shared = torch.tensor(float(input_variance), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    signals, slopes = [(own, shared)], []
    for _ in widths[1:-1]:
        q, r = sigma_w**2 * own + sigma_b**2, sigma_w**2 * shared + sigma_b**2
        c = torch.where(q > 0, r / q, torch.zeros_like(q))
        slopes.append(_slopes(phi, q, c))
        own, shared = expect(lambda u: phi(u).square(), q), expect_pair(lambda u, v: phi(u) * phi(v), q, q, c)
        signals.append((own, shared))
    one = torch.ones((), dtype=torch.float64)
    back = [(one, one)]  # of the linear output; then from the last hidden layer to the first
    for first, second in reversed(slopes):
        back.append((sigma_w**2 * back[-1][0] * first, sigma_w**2 * back[-1][1] * second))
    own_total, shared_total = (
        sum(float(b[r]) * (m * float(s[r]) + 1) for b, s, m in zip(reversed(back), signals, widths[:-1], strict=True))
        for r in (0, 1)
    )
    parameters = sum((m + 1) * n for m, n in zip(widths[:-1], widths[1:], strict=True))
    outputs, others = widths[-1], (samples - 1) / samples
    return FisherStatistics(
        outputs * own_total / parameters,
        outputs * (others * shared_total**2 + own_total**2 / samples) / parameters,
        others * shared_total + own_total / samples,
    )


def measured_fisher(model: nn.Module, x: Tensor, *, max_bytes: int = 2 << 30) -> FisherStatistics:
    """The same of any network, from its tangent kernel.

    Args:
        model: Maps a batch ``(T, ...)`` to ``(T, C)``; see :func:`~torch_meanfield.theory.ntk.empirical_ntk`, whose
            errors this raises.
        x: The T inputs.
        max_bytes: A bound on the memory.
    """
    kernel = empirical_ntk(model, x, max_bytes=max_bytes).double() / len(x)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return FisherStatistics(
        float(kernel.trace()) / parameters,
        float(kernel.square().sum()) / parameters,
        float(torch.linalg.eigvalsh(kernel)[-1]),
    )


def _slopes(phi: Activation, q: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """E[phi'(u)^2] and E[phi'(u) phi'(v)] for u, v of variance q and correlation c."""
    first = expect(lambda u: derivative(phi, u).square(), q)
    return first, expect_pair(lambda u, v: derivative(phi, u) * derivative(phi, v), q, q, c)
