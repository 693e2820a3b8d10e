r"""Deep and recurrent networks from one mean-field theory: their Gaussian kernels, and how far finite ones are from it.

Both compute :math:`h^{t} = W^{t}\phi(h^{t-1}) + U^{t} x^{t} + b^{t}`, :math:`h^0 = U^0 x^0 + b^0`, with
:math:`W_{ij} \sim N(0, \sigma_w^2 / n)`, :math:`U_{ij} \sim N(0, \sigma_u^2 / d)` and
:math:`b_i \sim N(0, \sigma_b^2)`. A deep network draws them anew in every layer t, a recurrent one once for all times.
In wide networks the :math:`h^t_i` of all inputs and times are Gaussian; the two differ in the correlation of different
times alone, not in what a readout at one time sees.

Source: Segadlo et al. 2021 (arXiv:2112.05589), the mean-field equations of deep and recurrent networks and their common
kernel; Poole et al. 2016 for a single layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_meanfield.theory.activation import Activation, elementwise
from torch_meanfield.theory.gaussian import broadcast
from torch_meanfield.theory.signal import checked, cross_moment, second_moment

_PAIRS = 256  # whose integrals are held at once: 10 MB in a tensor


def field_kernel(
    activation: Activation,
    inputs: Tensor,
    steps: int,
    sigma_w: float,
    sigma_b: float = 0.0,
    *,
    recurrent: bool,
    sigma_u: float = 1.0,
    max_bytes: int = 1 << 30,
) -> Tensor:
    r"""The covariance of pre-activations of a wide network, of all inputs at all layers or times.

    .. math:: K^{t,s}_{ab} = \sigma_w^2\, E\left[\phi(h_a^{t-1})\phi(h_b^{s-1})\right]
              + \sigma_u^2\, \frac{x_a^t\cdot x_b^s}{d} + \sigma_b^2

    for t = s, and for t and s that differ if the network is recurrent (there without the first term if t or s is 0);
    in a deep one layers are independent: 0.

    Args:
        activation: An element-wise callable.
        inputs: ``(B, d)``, read at t = 0 alone, or ``(steps + 1, B, d)``, one at each layer or time.
        steps: Layers, or time steps, after the first; at least 0.
        sigma_w, sigma_b, sigma_u: Standard deviations.
        recurrent: Whether the weights are the same at all times.
        max_bytes: What the result may take.

    Returns:
        ``(steps + 1, B, steps + 1, B)``, float64.

    Raises:
        ValueError: Inputs of another shape, a number out of its range, an activation that is not element-wise, or a
            kernel beyond ``max_bytes``, with the number of inputs that fits.

    Source: Segadlo et al. 2021.

    Example:
        >>> x = torch.eye(2)
        >>> deep, recurrent = (field_kernel(torch.erf, x, 3, 1.5, recurrent=r) for r in (False, True))
        >>> torch.equal(deep[3, :, 3], recurrent[3, :, 3]), deep[3, 0, 1, 0].item(), recurrent[3, 0, 2, 0].item() > 0
        (True, 0.0, True)
    """
    phi = elementwise(activation)
    x = _checked_inputs(inputs, steps, max_bytes)
    w, b, u = checked(sigma_w=sigma_w, sigma_b=sigma_b, sigma_u=sigma_u)
    times, batch, d = x.shape
    flat = x.reshape(-1, d)
    kernel = (u.square() * (flat @ flat.T) / d + b.square()).view(times, batch, times, batch)
    if not recurrent:
        kernel = kernel * torch.eye(times, dtype=torch.float64)[:, None, :, None]
    for gap in range(times if recurrent else 1):  # equal times first: the lengths of all are needed afterwards
        for t in range(1, times - gap):
            s = t + gap
            length = [kernel[at - 1, :, at - 1].diagonal() for at in (t, s)]
            product = w.square() * _products(phi, length[0], length[1], kernel[t - 1, :, s - 1])
            kernel[t, :, s] += product if gap else (product + product.T) / 2
            if s > t:
                kernel[s, :, t] += product.T
    return kernel


def length_variance(
    activation: Activation, steps: int, sigma_w: float, sigma_b: float = 0.0, *, recurrent: bool, q: float = 1.0
) -> Tensor:
    r"""n times the variance, over networks of width n, of the length that a layer or a time has, for one input.

    The length :math:`\hat q^{t+1} = \sigma_w^2 \frac1n\sum_i\phi(h_i^t)^2 + \sigma_b^2` of a finite network scatters
    about its limit by the scatter of its sum, and hands on the scatter it received. To first order in 1/n,

    .. math:: \delta q^{t+1} = \eta^t + \mathcal V'(q^t)\,\delta q^t, \qquad \delta q^0 = 0, \qquad
              n\,E[\eta^t\eta^s] = \sigma_w^4\,\mathrm{Cov}\left(\phi(h^t)^2, \phi(h^s)^2\right).

    In a deep network the terms of different layers are independent; in a recurrent one they add up, by as much as its
    times are correlated (biases and constant inputs do that), so that it is further from the same limit.

    Args:
        activation: An element-wise callable.
        steps: Layers or time steps after the first, at least 0.
        sigma_w, sigma_b: Standard deviations.
        recurrent: Whether the weights are the same at all times.
        q: Variance of :math:`h^0`, the bias included; the input is read at t = 0 alone.

    Returns:
        ``(steps + 1,)``, float64.

    Raises:
        ValueError: A negative number, a q below the variance of the bias, or an activation that is not element-wise.

    Source: Segadlo et al. 2021, Gaussian fluctuations of the auxiliary fields, written for the length of one input.

    Example:
        >>> found = length_variance(torch.relu, 2, 2**0.5, recurrent=False)
        >>> [round(v, 6) for v in found.tolist()]  # 4 (E[relu^4] - 1 / 4) = 5 a layer
        [0.0, 5.0, 10.0]
    """
    phi = elementwise(activation)
    length, b = checked(q=q, sigma_b=sigma_b)
    if float(length) < float(b) ** 2:
        least = float(b) ** 2
        raise ValueError(f"q includes the variance of the bias and is at least sigma_b**2 = {least:.6g}, got {q!r}")
    x = (length - b.square()).sqrt().view(1, 1)
    kernel = field_kernel(phi, x, steps, sigma_w, sigma_b, recurrent=recurrent)[:, 0, :, 0]
    w4 = float(sigma_w) ** 4
    at = kernel.diagonal().clone().requires_grad_()
    with torch.enable_grad():
        moments = second_moment(phi, at)
        (slopes,) = torch.autograd.grad(moments.sum(), at)
    moments = moments.detach()
    squares = _products(lambda u: phi(u).square(), kernel.diagonal(), kernel.diagonal(), kernel)
    noise = w4 * (squares - moments[:, None] * moments)
    if not recurrent:
        noise = noise.diagonal().diag()
    response = torch.zeros(steps + 1, steps + 1, dtype=torch.float64)  # of the length at t to the noise at s
    for t in range(steps):
        response[t + 1] = float(sigma_w) ** 2 * slopes[t] * response[t]
        response[t + 1, t] = 1
    return (response @ noise @ response.T).diagonal()


def _products(phi: Activation, q1: Tensor, q2: Tensor, covariance: Tensor) -> Tensor:
    """E[phi(u_a) phi(v_b)] for all pairs, a few at a time."""
    lengths = [t.flatten() for t in broadcast(q1[:, None], q2)]
    scale = (lengths[0] * lengths[1]).sqrt().clamp_min(1e-300)
    correlation = (covariance.flatten() / scale).clamp(-1, 1)
    starts = range(0, len(correlation), _PAIRS)
    parts = [[t[i : i + _PAIRS] for t in (*lengths, correlation)] for i in starts]
    return torch.cat([cross_moment(phi, a, b, c) for a, b, c in parts]).view(covariance.shape)


def _checked_inputs(inputs: Tensor, steps: int, max_bytes: int) -> Tensor:
    """float64 inputs of all times, or an error."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be an integer of at least 0, got {steps!r}")
    x = torch.as_tensor(inputs)
    if x.dim() == 2:
        at_start = x.to(torch.float64)
        x = torch.zeros(steps + 1, *x.shape, dtype=torch.float64)
        x[0] = at_start
    if x.dim() != 3 or len(x) != steps + 1 or 0 in x.shape:
        shape = tuple(torch.as_tensor(inputs).shape)
        raise ValueError(f"inputs must be (B, d) or ({steps + 1}, B, d) for {steps} steps, got shape {shape}")
    if not bool(x.isfinite().all()):
        raise ValueError("inputs must be finite")
    needed = 8 * (len(x) * x.shape[1]) ** 2
    if needed > max_bytes:
        fits = int((max_bytes / 8) ** 0.5) // len(x)
        raise ValueError(
            f"the kernel of {x.shape[1]} inputs at {len(x)} times takes {needed:,} bytes, more than max_bytes="
            f"{max_bytes:,}; {fits} inputs fit"
        )
    return x.to(torch.float64)
