"""Residual recurrences: closed forms, stacks of the depth wing at horizons 1 and n, and bad input."""

import pytest
import torch

from recipes.theory.stacks import linear_stack, measure_stack, padding_share, resnet_stage
from torch_meanfield.theory.residual import normalized_residual_propagation, residual_propagation

N = 24


def test_relu_stacks_in_closed_form():
    """He weights: lengths and gradients both times (1 + delta^2) in each branch."""
    steps = torch.tensor([1.0, 0.5, 0.0, 2.0])
    factors = 1 + steps.double() ** 2
    got = residual_propagation(torch.relu, steps, 2**0.5, p=3.0)
    assert torch.allclose(got.p, 3 * torch.cat([torch.ones(1).double(), factors.cumprod(0)]))
    assert torch.allclose(got.gradient, torch.cat([factors.flip(0).cumprod(0).flip(0), torch.ones(1).double()]))


def test_tanh_grows_linearly_in_length_and_like_the_root_of_depth_in_log_gradient():
    """Yang and Schoenholz 2017, Theorems 5 and 12."""
    track = residual_propagation(torch.tanh, torch.ones(1600), 1.0, c=0.3)
    increments = track.p.diff()
    assert 0.9 < float(increments[-1]) < 1 and float(increments[-1] - increments[800]) < 0.02
    logs = track.gradient.log()
    whole, quarter = float(logs[0]), float(logs[0] - logs[400])
    assert whole / quarter == pytest.approx(2, rel=0.1)  # sqrt(1600) / sqrt(400); linear growth would give 4


def test_short_steps_keep_lengths_and_gradients():
    for n in (10, 100):
        track = residual_propagation(torch.relu, torch.full((n,), 1 / n), 2**0.5)
        assert float(track.p[-1]) == pytest.approx((1 + n**-2) ** n)
        assert float(track.gradient[0]) == pytest.approx((1 + n**-2) ** n)


@pytest.mark.parametrize(("phi", "sigma_w", "tolerance"), [(torch.tanh, 1.0, 0.05), (torch.relu, 2**0.5, 0.25)])
@pytest.mark.parametrize("horizon", [1.0, float(N)])
def test_mean_field_sequential_follows(phi, sigma_w, tolerance, horizon):
    torch.manual_seed(0)
    layer = linear_stack(phi, N, 512, horizon, sigma_w)
    p, product, gradient = measure_stack(layer, torch.randn(8, 512))
    got = residual_propagation(phi, layer.steps().detach(), sigma_w, p=p[0], c=product[0] / p[0])
    assert float((p / got.p).log().abs().max()) < tolerance
    assert float((gradient / gradient[-1] / got.gradient).log().abs().max()) < 2 * tolerance  # predicted: e^4.7, e^17
    assert float((product / p - got.c).abs().max()) < 0.06
    if horizon == 1:
        assert float(gradient[0] / gradient[-1]) < 1.1


@pytest.mark.parametrize("horizon", [1.0, None])
def test_a_stage_of_the_mean_field_resnet_follows_on_digits(horizon):
    """16 channels: single draws scatter, so the logarithms of four are averaged."""
    lengths, gradients, growth = [], [], []
    for seed in range(4):
        torch.manual_seed(seed)
        layer, x = resnet_stage(N, horizon, batch=48)
        p, product, gradient = measure_stack(layer, x)
        he = 2 * padding_share(8)
        start = {"p": p[0], "c": product[0] / p[0]}
        steps = layer.steps().detach()
        got = normalized_residual_propagation(torch.relu, steps, variance=he, gain=he, **start)
        lengths.append((p / got.p).log())
        gradients.append((gradient / gradient[-1] / got.gradient).log())
        growth.append(got.gradient[0].log())
    assert float(torch.stack(lengths).mean(0).abs().max()) < 0.2
    # against a predicted growth of e^8, and of e^0.5
    assert float(torch.stack(gradients).mean(0).abs().max()) < 0.05 + 0.06 * float(torch.stack(growth).mean())


def test_normalized_branches_grow_slower_than_exponentially():
    track = normalized_residual_propagation(torch.relu, torch.ones(400), p=1.0)
    assert torch.allclose(track.p.diff(), torch.ones(400).double(), atol=1e-8)
    logs = track.gradient.log()
    # a power of the depth: doubling the depth adds a constant
    assert float(logs[100] - logs[200]) == pytest.approx(float(logs[200] - logs[400]), rel=0.05)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="steps must be a list of finite step sizes"):
        residual_propagation(torch.relu, [1.0, -0.1], 1.0)
    with pytest.raises(ValueError, match="sigma_v must be finite and not negative"):
        residual_propagation(torch.relu, [1.0], 1.0, sigma_v=-1.0)
    with pytest.raises(ValueError, match="layers must be an integer of at least 1, got 0"):
        normalized_residual_propagation(torch.relu, [1.0], layers=0)
    with pytest.raises(ValueError, match="p must be finite and not negative .a variance."):
        normalized_residual_propagation(torch.relu, [1.0], p=-1.0)
