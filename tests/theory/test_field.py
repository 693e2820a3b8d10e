"""Deep and recurrent networks: closed forms, the equality of their kernels, finite widths, and bad input."""

import math

import pytest
import torch
from torch import nn

from recipes.theory.field import INPUTS, SIGMA_B, SIGMA_W, lengths, networks
from torch_meanfield.theory.field import field_kernel, length_variance
from torch_meanfield.theory.signal import propagate


def arcsine(first, second, product):
    """E[erf(u) erf(v)], Williams 1997."""
    return 2 / math.pi * math.asin(2 * product / math.sqrt((1 + 2 * first) * (1 + 2 * second)))


def test_the_kernel_of_erf_is_the_arcsine_kernel_at_all_pairs_of_times():
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w, b, u = 1.4, 0.3, 0.7
    kernel = field_kernel(torch.erf, x, 3, w, b, recurrent=True, sigma_u=u)
    for t in range(4):
        for s in range(4):
            for i in range(3):
                for j in range(3):
                    expected = u**2 * float(x[t, i] @ x[s, j]) / 5 + b**2
                    if t and s:
                        q = [float(kernel[at - 1, k, at - 1, k]) for at, k in ((t, i), (s, j))]
                        expected += w**2 * arcsine(*q, float(kernel[t - 1, i, s - 1, j]))
                    assert float(kernel[t, i, s, j]) == pytest.approx(expected, abs=1e-7)
    flat = kernel.reshape(12, 12)
    assert torch.equal(flat, flat.T) and float(torch.linalg.eigvalsh(flat)[0]) > -1e-9


def test_deep_and_recurrent_networks_agree_at_one_time():
    for activation in (torch.tanh, torch.relu):
        deep, recurrent = (field_kernel(activation, INPUTS, 5, 1.3, 0.2, recurrent=r) for r in (False, True))
        for t in range(6):
            assert torch.equal(deep[t, :, t], recurrent[t, :, t])
            for s in range(t):
                assert bool((deep[t, :, s] == 0).all()) and bool((recurrent[t, :, s] != 0).all())


def test_one_time_is_what_signal_propagation_says():
    kernel = field_kernel(torch.tanh, INPUTS, 5, 1.3, 0.2, recurrent=True)
    q, c = float(kernel[0, 0, 0, 0]), float(kernel[0, 0, 0, 1] / kernel[0, 0, 0, 0])
    assert q == float(kernel[0, 1, 0, 1])
    track = propagate(torch.tanh, 5, 1.3, 0.2, q=q, c=c)
    at = torch.arange(6)
    torch.testing.assert_close(kernel[at, 0, at, 0], track.q)
    torch.testing.assert_close(kernel[at, 0, at, 1], track.c * track.q)


def test_linear_networks_of_finite_width_have_the_kernel_on_average():
    """Without biases a deep linear network's mean kernel is exact at any width; a recurrent one's to 1/n."""
    kernel = field_kernel(nn.Identity(), INPUTS, 3, SIGMA_W, SIGMA_B, recurrent=False)
    h = networks(nn.Identity(), INPUTS, 3, 30, 4_000, 0, recurrent=False).double()
    found = torch.einsum("mtaw,msbw->tasb", h, h) / (len(h) * 30)
    assert float((found - kernel).abs().max() / kernel.max()) < 0.02


def test_variance_of_finite_networks():
    """n times the variance is as predicted for both; where times are correlated the recurrent one's is larger."""
    steps, width, count = 4, 60, 4_000
    q = float(field_kernel(torch.erf, INPUTS[:1], 0, SIGMA_W, SIGMA_B, recurrent=False))
    scaled, predicted = [], []
    for recurrent in (False, True):
        h = networks(torch.erf, INPUTS[:1], steps, width, count, 0, recurrent=recurrent)
        scaled.append(width * lengths(torch.erf, h).var(0))
        predicted.append(length_variance(torch.erf, steps + 1, SIGMA_W, SIGMA_B, recurrent=recurrent, q=q)[1:])
        assert torch.allclose(scaled[-1], predicted[-1], rtol=0.12)
    assert float(predicted[1][-1] / predicted[0][-1]) > 1.4 and float(scaled[1][-1] / scaled[0][-1]) > 1.25


def test_without_biases_times_are_uncorrelated_and_both_scatter_alike():
    both = [length_variance(torch.tanh, 5, 1.4, recurrent=r) for r in (False, True)]
    torch.testing.assert_close(both[0], both[1])


def test_variance_of_erf_in_closed_form():
    """One layer: Var erf(h)^2 by a fine grid; the slope of the length map from the arcsine."""
    q, w, b = 0.7, 1.3, 0.2
    z = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2)
    density /= density.sum()

    def scatter(length):
        squares = torch.erf(length**0.5 * z).square()
        return float((density * squares.square()).sum() - (density * squares).sum() ** 2)

    first = w**4 * scatter(q)
    second = w**2 * arcsine(q, q, q) + b**2
    slope = w**2 * 4 / math.pi / (1 + 2 * second) / math.sqrt(1 + 4 * second)
    found = length_variance(torch.erf, 2, w, b, recurrent=False, q=q)
    assert found.tolist() == pytest.approx([0, first, w**4 * scatter(second) + slope**2 * first], rel=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: field_kernel(torch.tanh, torch.ones(3), 2, 1.0, recurrent=True), r"\(B, d\) or \(3, B, d\)"),
        (lambda: field_kernel(torch.tanh, torch.ones(2, 3, 4), 2, 1.0, recurrent=True), r"got shape \(2, 3, 4\)"),
        (lambda: field_kernel(torch.tanh, torch.ones(3, 4), -1, 1.0, recurrent=True), "steps"),
        (lambda: field_kernel(torch.tanh, torch.ones(3, 4), 1, -1.0, recurrent=True), "sigma_w"),
        (lambda: field_kernel(nn.Softmax(-1), torch.ones(3, 4), 1, 1.0, recurrent=True), "not element-wise"),
        (
            lambda: field_kernel(torch.tanh, torch.ones(100, 4), 9, 1.0, recurrent=True, max_bytes=1_000_000),
            "8,000,000 bytes, more than max_bytes=1,000,000; 35 inputs fit",
        ),
        (lambda: field_kernel(torch.tanh, torch.tensor([[math.nan]]), 1, 1.0, recurrent=True), "finite"),
        (lambda: length_variance(torch.tanh, -1, 1.0, recurrent=True), "steps"),
        (lambda: length_variance(torch.tanh, 1, 1.0, recurrent=True, q=-1.0), "a variance"),
        (lambda: length_variance(torch.tanh, 1, 1.0, 0.5, recurrent=True, q=0.2), "at least sigma_b"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
