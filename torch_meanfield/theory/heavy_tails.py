r"""Heavy-tailed weights: networks whose weights follow an alpha-stable law, as trained ones nearly do.

With :math:`W_{ij} \sim S_\alpha\big(\sigma_w / (2n)^{1/\alpha}\big)` pre-activations of a wide network are alpha-stable
too, of a scale that follows a deterministic map; alpha = 2 is the Gaussian network. Between order and chaos there is
not a line but a region of sigma_w in which signals and gradients cross deep networks.

Source: Qu, Wardak, Gong 2022 (arXiv:2203.12967).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from torch_meanfield.theory.activation import Activation, elementwise
from torch_meanfield.theory.gaussian import broadcast, legendre
from torch_meanfield.theory.signal import Number, checked, double


@torch.no_grad()
def heavy_tailed_(
    weight: Tensor, alpha: float, sigma_w: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    r"""Fill a weight with symmetric alpha-stable numbers of scale :math:`\sigma_w / (2 n_\text{in})^{1/\alpha}`.

    At alpha = 2 that is the normal law of variance :math:`\sigma_w^2 / n_\text{in}`.

    Args:
        weight: ``(out, in, ...)``.
        alpha: In (0, 2], below which moments of the weights are infinite.
        sigma_w: Not negative.
        generator: Source of randomness.

    Returns:
        ``weight``, filled in place.

    Raises:
        ValueError: Alpha outside (0, 2], a negative scale, or a tensor with fewer than two dimensions.

    Source: Qu et al. 2022, section II; Chambers, Mallows, Stuck 1976 for the sampling.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> round(heavy_tailed_(torch.empty(100, 100), 2.0).var().item() * 100, 1)
        1.0
    """
    _check_alpha(alpha)
    checked(sigma_w=sigma_w)
    if weight.ndim < 2:
        raise ValueError(f"weight must be (out, in, ...), got shape {tuple(weight.shape)}")
    device = "cpu" if generator is None else generator.device
    u, v = torch.rand(2, *weight.shape, generator=generator, dtype=torch.float64, device=device)
    scale = sigma_w / (2 * weight[0].numel()) ** (1 / alpha)
    return weight.copy_(scale * _stable(alpha, math.pi * (u - 0.5), -torch.log1p(-v)))


def heavy_tailed_length_map(
    activation: Activation, scale: Number, alpha: float, sigma_w: Number, sigma_b: Number = 0.0
) -> Tensor:
    r"""One layer's effect on the scale :math:`\gamma` of alpha-stable pre-activations :math:`h = \gamma s`.

    .. math:: \gamma'^{\,\alpha} = \frac{\sigma_w^\alpha}{2} E\left[|\phi(\gamma s)|^\alpha\right]
              + \frac{\sigma_b^\alpha}{2}, \qquad s \sim S_\alpha(1)

    At alpha = 2, where s has variance 2, this is the length map with :math:`q = 2 \gamma^2`.

    Args:
        activation: element-wise and bounded, or growing slower than its input (others have infinite moments).
        scale: :math:`\gamma`, not negative.
        alpha: In (0, 2].
        sigma_w, sigma_b: Scales of weights (times :math:`(2n)^{1/\alpha}`) and biases (times :math:`2^{1/\alpha}`).

    Returns:
        float64, of the common shape; differentiable.

    Raises:
        ValueError: Alpha outside (0, 2], a negative scale, an activation that is not element-wise.

    Source: Qu et al. 2022, the mean-field equation of section II.

    Example:
        >>> round(heavy_tailed_length_map(torch.tanh, 1e-4, 2.0, 1.5).item() / 1e-4, 3)
        1.5
    """
    phi = elementwise(activation)
    _check_alpha(alpha)
    gamma, w, b = checked(scale=scale, sigma_w=sigma_w, sigma_b=sigma_b)
    s, weight = _rule(alpha)
    moment = phi(gamma[..., None] * s).abs().pow(alpha) @ weight
    return ((w.pow(alpha) * moment + b.pow(alpha)) / 2).pow(1 / alpha)


def heavy_tailed_length(activation: Activation, alpha: float, sigma_w: Number, sigma_b: Number = 0.0) -> Tensor:
    """The scale at which the map settles, from 1 on, in at most 1,000 layers; float64, of the deviations' common shape.

    Raises:
        ValueError: As :func:`heavy_tailed_length_map`.
    """
    w, b = broadcast(double(sigma_w), double(sigma_b))
    gamma = torch.ones_like(w)
    for _ in range(1000):
        following = heavy_tailed_length_map(activation, gamma, alpha, w, b)
        settled = bool(((following - gamma).abs() <= 1e-12 * following.abs() + 1e-300).all())
        gamma = following
        if settled:
            break
    return gamma


@lru_cache(maxsize=8)
def _rule(alpha: float) -> tuple[Tensor, Tensor]:
    """Nodes and weights for the absolute value of s: over the two variables that it is drawn from."""
    x, w = legendre(40)
    # Squaring towards the ends where the tails are: the angle near pi / 2, the exponential near 0.
    angle, by_angle = math.pi / 2 * (1 - (1 - x).square()), 2 * (1 - x) * w
    t, by_t = 40 * x.square(), 40 * 2 * x * w
    by_t = by_t * torch.exp(-t)
    s = _stable(alpha, angle[:, None], t[None, :])
    weight = by_angle[:, None] * by_t[None, :]
    return s.flatten(), (weight / weight.sum()).flatten()


def _stable(alpha: float, angle: Tensor, exponential: Tensor) -> Tensor:
    """A symmetric alpha-stable number of scale 1 from an angle in (-pi / 2, pi / 2) and an exponential one."""
    power = (1 - alpha) / alpha
    front = torch.sin(alpha * angle) / torch.cos(angle).pow(1 / alpha)
    return front * (torch.cos((1 - alpha) * angle) / exponential).pow(power)


def _check_alpha(alpha: float) -> None:
    if not (isinstance(alpha, (int, float)) and 0 < alpha <= 2):
        raise ValueError(f"alpha must be in (0, 2], got {alpha!r}")
