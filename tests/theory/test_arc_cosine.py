"""Closed-form kernels of two-layer ReLU networks."""

import math

import pytest
import torch

from recipes.theory.two_layer import TwoLayer
from torch_meanfield.theory.arc_cosine import inner_kernel, outer_kernel
from torch_meanfield.theory.gaussian import expect_pair
from torch_meanfield.theory.ntk import empirical_ntk


def points(n=6, d=4):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_against_quadrature():
    x = points()
    lengths = x.norm(dim=1)
    correlation = (x @ x.T / lengths / lengths[:, None]).clamp(-1, 1)
    q = lengths.square()
    outer = expect_pair(lambda u, v: u.relu() * v.relu(), q[:, None], q, correlation)
    inner = expect_pair(lambda u, v: (u > 0).double() * (v > 0), q[:, None], q, correlation) * (x @ x.T)
    torch.testing.assert_close(outer_kernel(x), outer, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(inner_kernel(x), inner, rtol=1e-5, atol=1e-7)


def test_published_values():
    """Cho and Saul 2009: J_1 is pi at angle 0 and 0 at angle pi; J_0 falls linearly from pi to 0."""
    x = torch.tensor([[3.0, 0.0], [-2.0, 0.0], [1.0, 1.0]])
    outer, inner = outer_kernel(x), inner_kernel(x, output_variance=4.0)
    assert outer[0, 0].item() == pytest.approx(9 / 2) and outer[0, 1].item() == pytest.approx(0.0, abs=1e-15)
    assert inner[0, 0].item() == pytest.approx(4 * 9 / 2)
    assert inner[0, 2].item() == pytest.approx(4 * 3 * (3 / 4) / 2)
    theta = math.pi / 4
    assert outer[0, 2].item() == pytest.approx(
        3 * math.sqrt(2) * (math.sin(theta) + (math.pi - theta) * math.cos(theta)) / (2 * math.pi)
    )


def test_nearly_parallel_inputs_keep_their_angle():
    x = torch.tensor([[1.0, 0.0], [1.0, 1e-9]], dtype=torch.float64)
    assert 1 - 2 * inner_kernel(x)[0, 1].item() == pytest.approx(1e-9 / math.pi, rel=1e-6)


def test_the_empirical_kernel_of_a_wide_network():
    x = points()
    model = TwoLayer(4, 20_000, scale=20_000**-0.5, gamma=0.5, generator=torch.Generator().manual_seed(1))
    predicted = outer_kernel(x) + inner_kernel(x, output_variance=0.25)
    assert (empirical_ntk(model, x) - predicted).abs().max() < 0.02 * predicted.abs().max()


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(2, 3, 1)])
def test_bad_shapes(bad):
    with pytest.raises(ValueError, match="matrix"):
        outer_kernel(bad)
    with pytest.raises(ValueError, match="same width"):
        outer_kernel(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(TypeError, match="x must be a tensor"):
        inner_kernel([[1.0]])
    with pytest.raises(ValueError, match="output_variance"):
        inner_kernel(torch.ones(2, 3), output_variance=-1.0)
