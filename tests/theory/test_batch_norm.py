"""Batch norm's gradient explosion: the published constant, exact cases, networks, and bad input."""

import math

import pytest
import torch
from torch import nn

from recipes.theory.wide import batch_norm_gradients
from torch_meanfield.theory.batch_norm import batch_norm_gradient_growth


def test_relu_at_large_batch_is_the_published_constant():
    constant = math.pi / (math.pi - 1)
    assert float(batch_norm_gradient_growth(torch.relu)) == pytest.approx(constant, rel=1e-9)
    assert float(batch_norm_gradient_growth(torch.relu, 100_000)) == pytest.approx(constant, rel=1e-4)


@pytest.mark.parametrize("n", [4, 5, 8, 100])
def test_linear_units_in_closed_form(n):
    """tr(G - u u^T) = B - 2 and a - b = B / (B - 1), so the growth is (B - 2) / (B - 3)."""
    assert float(batch_norm_gradient_growth(torch.clone, n)) == pytest.approx((n - 2) / (n - 3), rel=1e-6)


@pytest.mark.parametrize("n", [5, 16])
def test_small_batches_against_the_definition_by_monte_carlo(n):
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(100_000, n, generator=generator, dtype=torch.float64)
    u = nn.functional.normalize(u - u.mean(1, keepdim=True))
    y = (n**0.5 * u).requires_grad_()
    value = y.relu()
    (slope,) = torch.autograd.grad(value.sum(), y)
    value, centre = value.detach(), torch.eye(n, dtype=torch.float64) - 1 / n
    spread = value.var(1).mean()  # mean of a - b over draws
    half = (centre - u[:, :, None] * u[:, None, :]) * slope[:, None, :] @ centre
    trace = half.square().sum((1, 2)).mean()
    definition = n * trace / (spread * (n - 1) * (n - 3))
    assert float(batch_norm_gradient_growth(torch.relu, n)) == pytest.approx(float(definition), rel=5e-3)


@pytest.mark.parametrize("phi", [torch.relu, torch.tanh])
def test_networks_follow_within_five_percent(phi):
    curve = batch_norm_gradients(phi, width=768, depth=12, batch=192, seed=0)
    rate = float((curve[2] / curve[-3]) ** (1 / (len(curve) - 5)))
    assert rate == pytest.approx(float(batch_norm_gradient_growth(phi, 192)), rel=0.02)
    assert rate == pytest.approx(float(batch_norm_gradient_growth(phi)), rel=0.05)


def test_batches_without_statistics_are_named():
    with pytest.raises(ValueError, match="at least two inputs, got batch_size=1"):
        batch_norm_gradient_growth(torch.relu, 1)
    with pytest.raises(ValueError, match="infinite for batches smaller than 4, got batch_size=3"):
        batch_norm_gradient_growth(torch.relu, 3)
    with pytest.raises(TypeError, match="must be an integer or None"):
        batch_norm_gradient_growth(torch.relu, 8.0)
    with pytest.raises(ValueError, match="is constant"):
        batch_norm_gradient_growth(torch.ones_like)
