"""Quadrature against closed forms: arc-cosine kernels, arc-sine kernels, moments, and derivatives."""

import math

import pytest
import torch

from torch_meanfield.theory.gaussian import expect, expect_pair, legendre

C = torch.tensor([-1.0, -0.9, -0.3, 0.0, 0.5, 0.9, 0.999, 1.0], dtype=torch.float64)
ONE = torch.ones((), dtype=torch.float64)


def test_gauss_legendre_is_exact_for_polynomials():
    x, w = legendre(6)
    for power in range(12):
        assert float(w @ x**power) == pytest.approx(1 / (power + 1), abs=1e-14)


@pytest.mark.parametrize("q", [1e-6, 1.0, 50.0, 1e8])
def test_moments_of_a_relu_and_of_a_smooth_activation(q):
    variance = q * ONE
    assert float(expect(lambda u: u.relu().square(), variance)) == pytest.approx(q / 2, rel=1e-9)
    assert float(expect(torch.relu, variance)) == pytest.approx(math.sqrt(q / (2 * math.pi)), rel=1e-9)
    erf = 2 / math.pi * math.asin(2 * q / (1 + 2 * q))
    assert float(expect(lambda u: torch.erf(u).square(), variance)) == pytest.approx(erf, rel=1e-4)


def test_relu_kernels_are_the_arc_cosine_kernels_at_every_correlation():
    """Cho and Saul 2009: orders 1 and 0."""
    angle = C.acos()
    first = (angle.sin() + (math.pi - angle) * C) / (2 * math.pi)
    zeroth = (math.pi - angle) / (2 * math.pi)
    got = expect_pair(lambda u, v: u.relu() * v.relu(), 2 * ONE, 3 * ONE, C)
    assert torch.allclose(got, math.sqrt(6) * first, atol=1e-9)
    got = expect_pair(lambda u, v: (u > 0).double() * (v > 0).double(), ONE, ONE, C)
    assert torch.allclose(got, zeroth, atol=1e-6)  # at c = 1 the correlation is shrunk by 1e-12, the angle by 1e-6


def test_erf_kernels_are_the_arc_sine_kernels():
    """Williams 1997."""
    got = expect_pair(lambda u, v: torch.erf(u) * torch.erf(v), 4 * ONE, 9 * ONE, C)
    assert torch.allclose(got, 2 / math.pi * torch.asin(12 * C / math.sqrt(9 * 19)), atol=1e-6)


@pytest.mark.parametrize("c", [-1.0, 0.3, 1.0])
def test_derivatives_are_those_of_the_closed_form_also_at_the_ends(c):
    """d/dc E[phi phi] = q E[phi' phi'], and with respect to a variance."""
    c = torch.tensor(c, dtype=torch.float64, requires_grad=True)
    q = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    value = expect_pair(lambda u, v: u.relu() * v.relu(), q, q, c)
    by_q, by_c = torch.autograd.grad(value, (q, c))
    assert by_c.item() == pytest.approx(2 * (math.pi - math.acos(c.item())) / (2 * math.pi), abs=1e-5)
    assert by_q.item() == pytest.approx(value.item() / 2, abs=1e-9)


def test_kinks_elsewhere_are_met_to_four_digits():
    """E[hardtanh(u)^2] = erf(1/sqrt2) - 2 phi(1) + P(|u| > 1), for q = 1; and with the kink inside a panel."""
    for q in (1.0, 0.7):
        s = math.sqrt(q)
        inside = math.erf(1 / (s * math.sqrt(2)))
        density = math.exp(-1 / (2 * q)) / math.sqrt(2 * math.pi)
        exact = q * (inside - 2 / s * density) + 1 - inside
        got = expect(lambda u: u.clamp(-1, 1).square(), q * ONE)
        assert float(got) == pytest.approx(exact, rel=1e-4)
