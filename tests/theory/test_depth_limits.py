"""Weight norm, quantised activations, heavy tails: closed forms, published constants, networks, bad input."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from recipes.theory.trainable import accuracy, mlp
from recipes.theory.wide import Setting, measure
from torch_meanfield.theory.heavy_tails import heavy_tailed_, heavy_tailed_length, heavy_tailed_length_map
from torch_meanfield.theory.quantised import (
    Quantised,
    quantised_depth_scale,
    quantised_edge,
    quantised_moments,
)
from torch_meanfield.theory.signal import length_map
from torch_meanfield.theory.weight_norm import weight_norm_

# -- weight norm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda a, b: nn.Linear(a, b), lambda a, b: nn.Conv1d(a, b, 1)])
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 48), (48, 24), (24, 96)])
def test_lengths_are_kept_through_a_relu(make, inputs, outputs):
    torch.manual_seed(0)
    layer = weight_norm_(weight_norm(make(inputs, outputs)))
    x = torch.randn(2000, inputs, *(1,) * (layer.weight.ndim - 2))
    out = layer(x).relu()
    assert out.square().sum().item() == pytest.approx(x.square().sum().item(), rel=0.05)
    rows = layer.weight.flatten(1).norm(dim=1)
    assert torch.allclose(rows, torch.full_like(rows, math.sqrt(2 * inputs / outputs)), rtol=1e-4)
    assert not layer.bias.any()


def test_a_residual_stage_stays_bounded_whatever_its_depth():
    torch.manual_seed(0)
    blocks, x = 40, torch.randn(64, 128)
    h = x
    for _ in range(blocks):
        first, last = (weight_norm(nn.Linear(128, 128)) for _ in range(2))
        weight_norm_(first)
        weight_norm_(last, gain=1.0, blocks=blocks)
        h = h + last(first(h).relu())
    ratio = (h.square().sum() / x.square().sum()).item()
    assert ratio == pytest.approx((1 + 1 / blocks) ** blocks, rel=0.15)


def test_deep_weight_normalised_networks_learn_with_these_gains_only():
    make = {
        "default": lambda a, b: weight_norm(nn.Linear(a, b)),
        "here": lambda a, b: weight_norm_(weight_norm(nn.Linear(a, b))),
    }
    got = {k: accuracy(lambda f=f: mlp(16, f, nn.ReLU), steps=50, lrs=(1e-3,), seed=0) for k, f in make.items()}
    assert got["here"] > 0.6 > 0.4 > got["default"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_weight_norm_names_what_it_cannot_take():
    with pytest.raises(TypeError, match="Linear is not weight-normalised"):
        weight_norm_(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="one is needed for each of 3 output units"):
        weight_norm_(weight_norm(nn.Linear(4, 3), dim=1))
    with pytest.raises(ValueError, match="blocks must be an integer of at least 1"):
        weight_norm_(weight_norm(nn.Linear(4, 3)), blocks=0)
    with pytest.raises(ValueError, match="gain must be positive"):
        weight_norm_(weight_norm(nn.Linear(4, 3)), gain=-1.0)
    old = weight_norm_(nn.utils.weight_norm(nn.Linear(4, 3)))
    assert torch.allclose(old.weight_g, torch.full((3, 1), math.sqrt(8 / 3)))


# -- quantised activations -----------------------------------------------------------------------------------------


def test_two_levels_are_the_sign():
    assert quantised_moments(2, 2.0) == pytest.approx((1, math.sqrt(2 / math.pi)))
    assert quantised_depth_scale(2, 0.3) == pytest.approx(-1 / math.log(2 / math.pi))


@pytest.mark.parametrize("levels", [2, 3, 4, 7, 16])
def test_moments_are_those_of_the_activation(levels):
    z = torch.linspace(-9, 9, 400_001, dtype=torch.float64)
    w = torch.exp(-z.square() / 2)
    value = Quantised(levels, 0.37)(z)
    assert len(value.unique()) == levels
    assert quantised_moments(levels, 0.37) == pytest.approx(
        (((value.square() * w).sum() / w.sum()).item(), ((value * z * w).sum() / w.sum()).item()), abs=1e-4
    )


def test_the_best_step_is_that_of_the_best_uniform_quantiser():
    """Max 1960, table II: steps 0.9957, 0.5860, 0.3352 for 4, 8 and 16 levels, errors 0.1188, 0.03744, 0.01154."""
    for levels, step, error in ((4, 0.9957, 0.1188), (8, 0.5860, 0.03744), (16, 0.3352, 0.01154)):
        edge = quantised_edge(levels)
        assert edge.step == pytest.approx(step, abs=2e-4)
        assert 1 - math.exp(-1 / edge.depth_scale) == pytest.approx(error, rel=2e-3)
        assert length_map(Quantised(levels, edge.step), 1.0, edge.sigma_w).item() == pytest.approx(1, rel=1e-2)


def test_depth_grows_with_the_published_power_of_the_levels():
    scales = [quantised_edge(n).depth_scale for n in (512, 1024)]
    assert math.log2(scales[1] / scales[0]) == pytest.approx(1.82, abs=0.02)


def test_correlations_of_wide_quantised_networks_decay_at_the_predicted_rate():
    edge = quantised_edge(4)
    q, c = measure([Setting("4", Quantised(4, edge.step), edge.sigma_w, 0.0, 1.0, 0.4)], 1024, 10, 64, seed=0)
    rate = 7 / math.log(c[0, 3] / c[0, 10])
    assert rate == pytest.approx(edge.depth_scale, rel=0.1)
    assert q[0, -1].item() == pytest.approx(1, rel=0.03)


def test_the_straight_through_estimator():
    x = torch.tensor([-2.0, -1.4, 0.2, 1.4, 1.6], requires_grad=True)
    Quantised(3, 1.0)(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_quantised_names_bad_input():
    for call in (lambda: Quantised(1, 1.0), lambda: quantised_edge(1), lambda: quantised_moments(1, 1.0)):
        with pytest.raises(ValueError, match="levels must be an integer of at least 2, got 1"):
            call()
    with pytest.raises(ValueError, match="step must be positive"):
        Quantised(4, 0.0)


# -- heavy tails ---------------------------------------------------------------------------------------------------


def test_alpha_two_is_the_gaussian_network():
    weight = heavy_tailed_(torch.empty(300, 200), 2.0, 1.5, generator=torch.Generator().manual_seed(0))
    assert weight.var().item() * 200 == pytest.approx(2.25, rel=0.02)
    gamma = torch.tensor([0.1, 0.7, 3.0])
    got = 2 * heavy_tailed_length_map(torch.tanh, gamma, 2.0, 1.5).square()
    assert torch.allclose(got, length_map(torch.tanh, 2 * gamma.square(), 1.5), rtol=1e-4)


def test_alpha_one_is_the_cauchy_law():
    generator = torch.Generator().manual_seed(0)
    weight = heavy_tailed_(torch.empty(400, 250), 1.0, 2.0, generator=generator) * 500 / 2.0
    for share in (0.5, 0.75, 0.95):
        exact = math.tan(math.pi * share / 2)  # P(|s| < t) = 2 atan(t) / pi
        assert weight.abs().quantile(share).item() == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_wide_networks_follow_the_map(alpha):
    torch.manual_seed(0)
    gamma = heavy_tailed_length(torch.tanh, alpha, 2.0).item()
    h, power = torch.randn(16, 800), []
    for layer in range(9):
        h = h.tanh() @ heavy_tailed_(torch.empty(800, 800), alpha, 2.0).T
        if layer >= 4:
            power.append(h.tanh().abs().pow(alpha).mean().item())
    # gamma^alpha = sigma_w^alpha / 2 E|tanh h|^alpha at the fixed point
    assert sum(power) / len(power) == pytest.approx(2 * (gamma / 2) ** alpha, rel=0.05)


def test_heavy_tails_name_bad_input():
    for alpha in (0.0, 2.1, "x"):
        with pytest.raises(ValueError, match=r"alpha must be in \(0, 2\]"):
            heavy_tailed_(torch.empty(3, 3), alpha)
    with pytest.raises(ValueError, match="sigma_w must be finite and not negative"):
        heavy_tailed_(torch.empty(3, 3), 1.0, -1.0)
    with pytest.raises(ValueError, match="must be .out, in"):
        heavy_tailed_(torch.empty(3), 1.0)
    with pytest.raises(ValueError, match="scale must be finite"):
        heavy_tailed_length_map(torch.tanh, -1.0, 1.5, 1.0)
