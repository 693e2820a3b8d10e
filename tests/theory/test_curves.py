"""A circle through the layers: kernels in closed form, a plane curve, networks of width 600, and bad input."""

import math

import pytest
import torch
from torch import nn

from recipes.theory.curves import layers, measured
from torch_meanfield.theory.curves import measure_curve, propagate_circle
from torch_meanfield.theory.phase import phase


def kernel_of_sines(angle, depth, w, b, q):
    """E[h(t) h(t + angle)] with phi = sin, from E[sin u sin v] = exp(-q) sinh(K); and the length it starts from."""
    k, length = q * torch.cos(angle), q
    for _ in range(depth):
        k = w**2 * math.exp(-length) * torch.sinh(k) + b**2
        length = w**2 * math.exp(-length) * math.sinh(length) + b**2
    return k


def test_networks_of_sines_are_as_their_kernel_in_closed_form():
    """Speed and acceleration are the second and the fourth derivative of the kernel of the curve, far from q* too."""
    for w, b, q in ((2.5, 0.3, 1.0), (0.7, 0.2, 3.0), (4.0, 0.0, 0.2)):
        found = propagate_circle(torch.sin, 6, w, b, q=q)
        for depth in (0, 1, 2, 6):
            at = torch.zeros((), dtype=torch.float64, requires_grad=True)
            derivatives = [kernel_of_sines(at, depth, w, b, q)]
            for _ in range(4):
                derivatives.append(torch.autograd.grad(derivatives[-1], at, create_graph=True)[0])
            derivatives = [d.detach() for d in derivatives]
            speed, curvature = (-derivatives[2]).sqrt(), derivatives[4].sqrt() / -derivatives[2]
            assert float(found.length[depth]) == pytest.approx(2 * math.pi * float(speed), rel=1e-9)
            assert float(found.curvature[depth]) == pytest.approx(float(curvature), rel=1e-9)
            assert float(found.grassmannian[depth]) == pytest.approx(2 * math.pi * float(speed * curvature), rel=1e-9)


def test_one_layer_of_erf_in_closed_form():
    """E[erf'^2] = (4 / pi) (1 + 4q)^(-1/2), E[erf''^2] = (16 / pi) q (1 + 4q)^(-3/2)."""
    w, q = 1.7, 0.8
    found = propagate_circle(torch.erf, 1, w, q=q)
    chi_1 = w**2 * 4 / math.pi / math.sqrt(1 + 4 * q)
    chi_2 = w**2 * 16 / math.pi * q * (1 + 4 * q) ** -1.5
    assert float(found.length[1]) == pytest.approx(2 * math.pi * math.sqrt(chi_1 * q), rel=1e-9)
    assert float(found.curvature[1]) == pytest.approx(math.sqrt(3 * chi_2 / chi_1**2 + 1 / (q * chi_1)), rel=1e-9)


def test_linear_layers_keep_a_circle_a_circle():
    found = propagate_circle(nn.Identity(), 5, 1.3, 0.4, q=2.0)
    assert torch.allclose(found.grassmannian, torch.full((6,), 2 * math.pi, dtype=torch.float64), rtol=1e-12)


def test_lengths_grow_by_the_root_of_chi_1_and_the_curvature_settles():
    w, b = 2.5, 0.3
    limit = phase(torch.tanh, w, b)
    found = propagate_circle(torch.tanh, 40, w, b, q=float(limit.q_star))
    assert limit.name == "chaotic"
    for lengths in (found.length, found.grassmannian):
        assert float(lengths[-1] / lengths[-2]) == pytest.approx(float(limit.chi_1.sqrt()), rel=1e-6)
    assert float(found.curvature[-1] / found.curvature[-2]) == pytest.approx(1, rel=1e-6)
    ordered = propagate_circle(torch.tanh, 40, 0.8, b)
    assert float(ordered.length[-1]) < 1e-3 and float(ordered.curvature[-1]) > 1e3


def test_an_ellipse():
    """Its length is a complete elliptic integral; its unit tangent turns once; curvature from 1/4 to 2."""
    found = measure_curve(lambda t: torch.stack([2 * t.cos(), t.sin()], 1), 512)
    assert float(found.length) * 2**0.5 == pytest.approx(9.688448220547675, rel=1e-10)
    assert float(found.grassmannian) == pytest.approx(2 * math.pi, rel=1e-10)


def test_networks_follow_within_five_percent():
    for w, b in ((1.5, 0.3), (2.5, 0.3)):
        found, error = measured(torch.tanh, 400, 6, w, b, networks=8, seed=0, angles=64)
        predicted = propagate_circle(torch.tanh, 6, w, b)
        assert float(error) < 0.02
        for name in ("length", "grassmannian", "curvature"):
            assert float((getattr(found, name) / getattr(predicted, name) - 1).abs().max()) < 0.05, name


def test_derivatives_are_those_of_the_polygon():
    """The measured length is that of many short chords."""
    image = layers(torch.tanh, 50, 3, 2.0, 0.3, 0)
    points = image(2 * math.pi * torch.arange(20_000, dtype=torch.float64) / 20_000)
    chords = (points - points.roll(-1, 0)).norm(dim=-1).sum(0) / 50**0.5
    assert torch.allclose(measure_curve(image, 2_000).length, chords, rtol=1e-5)


def test_settings_broadcast():
    grid = propagate_circle(torch.tanh, 3, torch.tensor([[1.0], [2.0]]), torch.tensor([0.1, 0.2, 0.3]))
    one = propagate_circle(torch.tanh, 3, 2.0, torch.tensor(0.2))
    assert grid.length.shape == (4, 2, 3)
    assert torch.allclose(grid.curvature[:, 1, 1], one.curvature)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: propagate_circle(torch.relu, 3, 1.5), "relu has kinks"),
        (lambda: propagate_circle(nn.Hardtanh(), 3, 1.5), "Hardtanh has kinks"),
        (lambda: propagate_circle(torch.sign, 3, 1.5), "sign has steps"),
        (lambda: propagate_circle(nn.Softmax(-1), 3, 1.5), "not element-wise"),
        (lambda: propagate_circle(torch.tanh, 3, 1.5, q=0.0), "q must be above 0"),
        (lambda: propagate_circle(torch.tanh, 3, 1.5, q=-1.0), "a variance"),
        (lambda: propagate_circle(torch.tanh, -3, 1.5), "depth must be an integer of at least 0, got -3"),
        (lambda: measure_curve(torch.cos), r"must map \(256,\) angles to \(256, ..., N\) points, got shape \(256,\)"),
        (lambda: measure_curve(torch.cos, 2), "angles must be an integer of at least 3, got 2"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
