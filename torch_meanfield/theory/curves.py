r"""What a wide random network does to a circle: its length, how often it turns, and how sharply.

The pre-activations of a great circle of inputs, :math:`h^0(\theta) = \sqrt{N q}\,(u_0\cos\theta + u_1\sin\theta)`, are
in every layer of a wide network a stationary Gaussian process of the angle. Its velocity and acceleration follow
recursions of their own, and with them the Euclidean length of the curve, the length that its unit tangent draws on the
sphere (the Grassmannian length: it counts turns) and its extrinsic curvature. In the chaotic phase both lengths grow
exponentially with depth, while the curvature settles: the curve fills space. Lengths are in units of
:math:`\sqrt N`, curvatures of :math:`1 / \sqrt N`, N the width.

Source: Poole et al. 2016 (arXiv:1606.05340), section 3, eqs. (6)-(8). There they stand at the fixed point of the
length; they hold at any length, since :math:`E[h h'']` cancels from the mean squared acceleration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_meanfield.theory.activation import Activation, derivative, elementwise, name_of, value_and_derivative
from torch_meanfield.theory.gaussian import broadcast, expect
from torch_meanfield.theory.phase import squared_slope
from torch_meanfield.theory.signal import Number, checked, second_moment


@dataclass(frozen=True, eq=False)
class CurveGeometry:
    r"""A closed curve, predicted layer by layer or measured; float64 of one shape.

    Attributes:
        length: Euclidean length :math:`\oint \sqrt{g}\,d\theta`, over the root of the width.
        grassmannian: Length of the curve of unit tangents, :math:`\oint \kappa\sqrt{g}\,d\theta`; 2 pi for a plane
            convex curve.
        curvature: Extrinsic curvature :math:`\kappa` times the root of the width; of a measured curve the root of its
            mean square over the angles.
    """

    length: Tensor
    grassmannian: Tensor
    curvature: Tensor


def propagate_circle(
    activation: Activation, depth: int, sigma_w: Number, sigma_b: Number = 0.0, *, q: Number = 1.0
) -> CurveGeometry:
    r"""The image of a great circle of inputs in each layer of a wide random network.

    .. math::
        g^l = \chi_1\, g^{l-1}, \qquad (\kappa^l)^2 = \frac{3\chi_2}{\chi_1^2} + \frac{(\kappa^{l-1})^2}{\chi_1}, \qquad
        \chi_1 = \sigma_w^2 E[\phi'(h)^2], \quad \chi_2 = \sigma_w^2 E[\phi''(h)^2], \quad h \sim N(0, q^{l-1})

    from :math:`g^0 = q` and :math:`(\kappa^0)^2 = 1 / q`; the lengths are :math:`2\pi\sqrt{g^l}` and
    :math:`2\pi\kappa^l\sqrt{g^l}`.

    Args:
        activation: An element-wise callable without kinks: at a kink the curvature is infinite.
        depth: Number of layers, at least 0.
        sigma_w, sigma_b: Standard deviations of weights (times the root of the width) and biases.
        q: Variance of the first pre-activations, above 0; all broadcast against each other.

    Returns:
        ``(depth + 1, ...)`` each.

    Raises:
        ValueError: A negative deviation, a variance that is not positive, a negative depth, or an activation with kinks
            or steps, or one that is not element-wise.

    Source: Poole et al. 2016, eqs. (7) and (8).

    Example:
        >>> circle = propagate_circle(torch.erf, 10, sigma_w=3.0, sigma_b=0.3)
        >>> [round(float(v), 2) for v in circle.length[::5]]
        [6.28, 74.26, 491.92]
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
        raise ValueError(f"depth must be an integer of at least 0, got {depth!r}")
    phi = elementwise(activation)
    length, w, b = broadcast(*checked(q=q, sigma_w=sigma_w, sigma_b=sigma_b))
    if not bool((length > 0).all()):
        raise ValueError(f"q must be above 0 (a circle of no size has no curvature), got {q!r}")
    speeds, squares = [length], [1 / length]
    for _ in range(depth):
        _check_smooth(phi, activation, float(length.max()))
        chi_1 = w.square() * squared_slope(phi, length)
        chi_2 = w.square() * expect(lambda u: _second_derivative(phi, u).square(), length)
        speeds.append(chi_1 * speeds[-1])
        squares.append(3 * chi_2 / chi_1.square() + squares[-1] / chi_1)
        length = w.square() * second_moment(phi, length) + b.square()
    speed, curvature = torch.stack(speeds).sqrt(), torch.stack(squares).sqrt()
    return CurveGeometry(2 * math.pi * speed, 2 * math.pi * speed * curvature, curvature)


def measure_curve(curve: Callable[[Tensor], Tensor], angles: int = 256) -> CurveGeometry:
    r"""Length, Grassmannian length and curvature of any closed curve, such as the image of a circle under a network.

    .. math:: g = v\cdot v, \qquad \kappa = \sqrt{(v\cdot v)(a\cdot a) - (v\cdot a)^2}\;/\;g^{3/2}

    with velocity v and acceleration a by two forward derivatives, exact at every angle.

    Args:
        curve: Maps angles ``(M,)``, float64 in [0, 2 pi), to points ``(M, N)``, each angle alone. For the layers of a
            network, points ``(M, layers, N)``.
        angles: How many evenly spaced angles, at least 3.

    Returns:
        Of the shape between the first and the last dimension of the points: ``()`` or ``(layers,)``.

    Raises:
        ValueError: Fewer than three angles, or points of another shape.

    Source: Poole et al. 2016, section 3.

    Example:
        >>> found = measure_curve(lambda t: torch.stack([3 * t.cos(), 3 * t.sin()], 1))
        >>> round(float(found.length) * 2**0.5 / torch.pi, 6), round(float(found.curvature) / 2**0.5, 6)
        (6.0, 0.333333)
    """
    if isinstance(angles, bool) or not isinstance(angles, int) or angles < 3:
        raise ValueError(f"angles must be an integer of at least 3, got {angles!r}")
    theta = 2 * math.pi * torch.arange(angles, dtype=torch.float64) / angles
    with torch.enable_grad():
        points = curve(theta.requires_grad_())
        if points.dim() < 2 or len(points) != angles:
            shape = tuple(points.shape)
            raise ValueError(f"curve must map ({angles},) angles to ({angles}, ..., N) points, got shape {shape}")
        v = _along(points, theta)
        a = _along(v, theta).detach()
    v = v.detach()
    width = v.shape[-1]
    g, square, product = v.square().sum(-1), a.square().sum(-1), (v * a).sum(-1)
    squared = (g * square - product.square()).clamp_min(0) / g.pow(3)
    around = 2 * math.pi
    return CurveGeometry(
        around * (g / width).sqrt().mean(0),
        around * (squared * g).sqrt().mean(0),
        (width * squared).mean(0).sqrt(),
    )


def _along(points: Tensor, theta: Tensor) -> Tensor:
    """The derivative of each row of ``points`` by its own angle: a backward pass is linear in what it is given."""
    given = torch.zeros_like(points).requires_grad_()
    (slopes,) = torch.autograd.grad(points, theta, given, create_graph=True)
    (tangent,) = torch.autograd.grad(slopes.sum(), given, create_graph=True)
    return tangent


def _second_derivative(phi: Activation, u: Tensor) -> Tensor:
    """phi''(u)."""
    with torch.enable_grad():
        at = u if u.requires_grad else u.detach().requires_grad_()
        slope = derivative(phi, at)
        if not slope.requires_grad:
            return torch.zeros_like(u)
        (second,) = torch.autograd.grad(slope.sum(), at, create_graph=u.requires_grad)
    return second if u.requires_grad else second.detach()


def _check_smooth(phi: Activation, given: Activation, q: float) -> None:
    """phi and phi' must be the integrals of their derivatives where pre-activations of variance ``q`` are."""
    reach = min(8 * math.sqrt(q), 50.0)
    # An odd number of cells around 0: the usual kink, at 0, lies inside one.
    grid = torch.linspace(-reach, reach, 16_000, dtype=torch.float64)
    value, slope = value_and_derivative(phi, grid)
    second = _second_derivative(phi, grid)
    cell = grid[1] - grid[0]
    for name, f, df in (("steps", value, slope), ("kinks", slope, second)):
        missing = (f.diff() - cell * (df[1:] + df[:-1]) / 2).abs().max()
        if float(missing) > 1e-2 * float(f.abs().max().clamp_min(1e-300)):
            raise ValueError(
                f"activation {name_of(given)} has {name}, where the curvature of its image is infinite; pass a smooth "
                f"one such as torch.tanh or nn.GELU()"
            )
