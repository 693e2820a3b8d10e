r"""Dynamical isometry: initialisers under which signals and gradients cross very deep networks unharmed.

At the edge of chaos the *mean* squared singular value of the input-output Jacobian is 1. With orthogonal weights and
short pre-activations all of them are near 1: their variance is :math:`L (\mu_2 / \mu_1^2 - 1)`, which a small length
q* makes as small as one likes, where Gaussian weights add L.

Source: Xiao et al. 2018 (arXiv:1806.05393), Algorithm 1 and section 2; Chen, Pennington, Schoenholz 2018
(arXiv:1806.05394), section 3; Pennington, Schoenholz, Ganguli 2017 (arXiv:1711.04735), eq. (22).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from torch_meanfield.theory.activation import Activation, derivative, elementwise
from torch_meanfield.theory.gaussian import expect
from torch_meanfield.theory.phase import Critical, critical
from torch_meanfield.theory.signal import Number, checked, second_moment

_RNN_ACTIVATIONS: dict[str, Activation] = {"tanh": torch.tanh, "relu": torch.relu}


class JacobianMoments(NamedTuple):
    """Of the squared singular values of an input-output Jacobian: 0-d float64 tensors."""

    mean: Tensor
    variance: Tensor


@torch.no_grad()
def delta_orthogonal_(weight: Tensor, gain: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    r"""Fill a convolution's weight with zeros but for its middle tap, an orthogonal matrix times ``gain``.

    The convolution then acts on every pixel by one matrix with orthonormal columns: with stride 1 and "same" padding it
    keeps all lengths and angles, times ``gain``, at the borders too.

    Args:
        weight: ``(out, in, *kernel)`` of a convolution with groups=1: at least as many channels out as in, a kernel of
            odd sizes.
        gain: What lengths are multiplied with: ``critical(activation, sigma_b).sigma_w``.
        generator: Source of randomness.

    Returns:
        ``weight``, filled in place.

    Raises:
        ValueError: Fewer channels out than in, an even kernel size (it has no middle), a tensor without kernel
            dimensions, or a gain that is not positive. Nothing has changed then.

    Source: Xiao et al. 2018, Algorithm 1.

    Example:
        >>> conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        >>> _ = delta_orthogonal_(conv.weight)
        >>> x = torch.randn(1, 4, 5, 5)
        >>> torch.allclose(conv(x).norm(), x.norm())
        True
    """
    if weight.ndim < 3:
        raise ValueError(f"weight must be that of a convolution, (out, in, *kernel), got shape {tuple(weight.shape)}")
    out, into, *kernel = weight.shape
    if into > out:
        raise ValueError(
            f"weight has {into} channels in and {out} out; fewer out than in cannot keep lengths: initialise this "
            f"layer otherwise"
        )
    if any(k % 2 == 0 for k in kernel):
        raise ValueError(f"weight has a kernel of {tuple(kernel)}; an even size has no middle tap")
    _check_gain(gain)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32  # orthogonalised in no less
    wide = torch.empty(out, into, dtype=dtype, device=weight.device)
    middle = weight.zero_()
    for k in reversed(kernel):
        middle = middle.select(-1, k // 2)  # a view: of the last dimension each time
    middle.copy_(gain * nn.init.orthogonal_(wide, generator=generator))
    return weight


@torch.no_grad()
def critical_orthogonal_(
    rnn: nn.RNN | nn.RNNCell,
    *,
    input_scale: float = 0.1,
    input_power: float = 1.0,
    sigma_b: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[Critical]:
    r"""Initialise a recurrent network :math:`h_t = \phi(W h_{t-1} + U x_t + b)` on its edge of chaos.

    The input acts on the recurrence as random biases do, so the length is kept where

    .. math:: q^* = \sigma_w^2 E[\phi(\sqrt{q^*} z)^2] + \sigma_u^2 R + \sigma_b^2, \qquad
              \sigma_w^2 E[\phi'(\sqrt{q^*} z)^2] = 1

    and W is :math:`\sigma_w` times an orthogonal matrix, U Gaussian of variance :math:`\sigma_u^2` over the number of
    inputs, ``bias_ih`` of deviation :math:`\sigma_b`, ``bias_hh`` 0. Small inputs (:math:`\sigma_u`) keep gradients for
    longer: see :func:`jacobian_moments`.

    Args:
        rnn: A vanilla ``nn.RNN`` (layers and directions each initialised so) or ``nn.RNNCell``.
        input_scale: :math:`\sigma_u`.
        input_power: R, the mean square of an entry of the input; of later layers it is computed.
        sigma_b: Deviation of the biases.
        generator: Source of randomness.

    Returns:
        For each layer (and direction) sigma_w, the deviation of input and biases together, and q*.

    Raises:
        TypeError: Gated cells (LSTM, GRU), whose critical points are others.
        ValueError: A negative deviation or power, or a ReLU with any input: it has no edge of chaos with biases. All
            before anything has changed.

    Source: Chen, Pennington, Schoenholz 2018, section 3 (the vanilla network).

    Example:
        >>> rnn = nn.RNN(8, 32)
        >>> round(critical_orthogonal_(rnn)[0].q_star.item(), 3)
        0.273
    """
    if not isinstance(rnn, (nn.RNN, nn.RNNCell)):
        raise TypeError(
            f"rnn must be a vanilla nn.RNN or nn.RNNCell, got {type(rnn).__name__}; gated cells have other "
            f"critical points"
        )
    scale, power, bias = (t.item() for t in checked(sigma_u=input_scale, power=input_power, sigma_b=sigma_b))
    phi = _RNN_ACTIVATIONS[rnn.nonlinearity]
    found: list[Critical] = []
    layers = rnn.num_layers if isinstance(rnn, nn.RNN) else 1
    directions = 2 if isinstance(rnn, nn.RNN) and rnn.bidirectional else 1
    plan: list[tuple[str, Critical]] = []
    for k in range(layers):
        edge = critical(phi, math.sqrt(scale**2 * power + bias**2))
        power = second_moment(phi, edge.q_star).item()
        for d in range(directions):
            plan.append(("" if isinstance(rnn, nn.RNNCell) else f"_l{k}{'_reverse' * d}", edge))
    for suffix, edge in plan:
        into, recurrent = getattr(rnn, f"weight_ih{suffix}"), getattr(rnn, f"weight_hh{suffix}")
        into.normal_(0, scale / into.shape[1] ** 0.5, generator=generator)
        nn.init.orthogonal_(recurrent, gain=edge.sigma_w.item(), generator=generator)
        if rnn.bias:
            getattr(rnn, f"bias_ih{suffix}").normal_(0, bias, generator=generator)
            getattr(rnn, f"bias_hh{suffix}").zero_()
        found.append(edge)
    return found


def edge_at(activation: Activation, q: Number) -> Critical:
    r"""The point on the edge of chaos that keeps the length ``q``: :func:`.critical`, solved the other way.

    .. math:: \sigma_w^2 = 1 / E[\phi'(\sqrt q z)^2], \qquad \sigma_b^2 = q - \sigma_w^2 E[\phi(\sqrt q z)^2]

    For isometry in L layers choose q well below 1 / L: the variance of squared singular values is then about 2 L q
    times a number of order 1 (tanh), see :func:`jacobian_moments`.

    Args:
        activation: Any element-wise callable.
        q: The length, positive.

    Raises:
        ValueError: A length that is not positive, one that no bias keeps (the activation would need a negative
            variance), or an activation that is not element-wise.

    Source: Hayou et al. 2018, Algorithm 1; Pennington et al. 2017, section 2.4, for the choice of q.

    Example:
        >>> round(edge_at(torch.tanh, 0.57).sigma_w.item() ** 2, 2)
        1.76
    """
    phi = elementwise(activation)
    (length,) = checked(q=q)
    if not bool((length > 0).all()):
        raise ValueError(f"q must be positive, got {q!r}")
    w2 = 1 / expect(lambda u: derivative(phi, u).square(), length)
    b2 = length - w2 * second_moment(phi, length)
    if not bool((b2 >= -1e-9 * length).all()):
        raise ValueError(
            f"no edge of chaos keeps the length q={q!r}: it would need biases of variance {b2.min().item():.3g}"
        )
    return Critical(w2.sqrt(), b2.clamp_min(0).sqrt(), length)


def jacobian_moments(
    activation: Activation,
    sigma_w: Number,
    q: Number,
    depth: int,
    weights: Literal["gaussian", "orthogonal"] = "gaussian",
) -> JacobianMoments:
    r"""Mean and variance of the squared singular values of a deep network's input-output Jacobian.

    With :math:`\mu_k = E[\phi'(\sqrt q z)^{2k}]`, and s = 1 for Gaussian weights, 0 for orthogonal ones,

    .. math:: m_1 = (\sigma_w^2 \mu_1)^L, \qquad \sigma^2 = m_1^2\, L \left(\frac{\mu_2}{\mu_1^2} - 1 + s\right)

    Args:
        activation: Any element-wise callable.
        sigma_w: Deviation of the weights (times the root of the width), or the gain of the orthogonal matrices.
        q: Variance of the pre-activations, the same in all layers (at the fixed point).
        depth: L, the number of layers.
        weights: Their law.

    Raises:
        ValueError: An unknown law, a depth below 1, a negative variance, an activation that is not element-wise.

    Source: Pennington, Schoenholz, Ganguli 2017, eq. (22).

    Example:
        >>> jacobian_moments(torch.clone, 1.0, 1.0, 10).variance.item()  # a product of 10 Gaussian matrices
        10.0
    """
    phi = elementwise(activation)
    if weights not in ("gaussian", "orthogonal"):
        raise ValueError(f"weights must be 'gaussian' or 'orthogonal', got {weights!r}")
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ValueError(f"depth must be an integer of at least 1, got {depth!r}")
    w, length = checked(sigma_w=sigma_w, q=q)
    first = expect(lambda u: derivative(phi, u).square(), length)
    second = expect(lambda u: derivative(phi, u).pow(4), length)
    mean = (w.square() * first).pow(depth)
    spread = second / first.square() - 1 + (1 if weights == "gaussian" else 0)
    # rounding leaves a linear network's orthogonal spread at 1e-16, of either sign
    return JacobianMoments(mean, mean.square() * depth * torch.where(spread.abs() < 1e-14, 0.0, spread))


def jacobian_spectrum(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Singular values of the Jacobian of ``function`` at one input, in descending order.

    Args:
        function: A network or part of one, without batch statistics.
        x: One input, without a batch dimension unless ``function`` wants one of size 1.

    Returns:
        ``(min(outputs, inputs),)``, in the dtype of ``x``. Memory: one number for each output and input.

    Raises:
        ValueError: ``x`` is not floating point.

    Example:
        >>> jacobian_spectrum(lambda x: 3 * x, torch.ones(2)).tolist()
        [3.0, 3.0]
    """
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point to be differentiated, got {x.dtype}")
    jacobian: Any = torch.autograd.functional.jacobian(function, x.detach())  # type: ignore[no-untyped-call, unused-ignore]
    if not isinstance(jacobian, Tensor):
        raise TypeError(f"function must return one tensor, got {type(jacobian).__name__}")
    values: Tensor = torch.linalg.svdvals(jacobian.reshape(-1, x.numel()))
    return values


def _check_gain(gain: float) -> None:
    if not (math.isfinite(gain) and gain > 0):
        raise ValueError(f"gain must be positive and finite, got {gain!r}")
