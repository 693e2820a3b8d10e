"""Isometric initialisers: exactly isometric maps, a 10,000-layer CNN, spectra beside their moments, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from recipes.theory.deep_cnn import DeepCNN, gradient_norms, he_, isometric_, train
from recipes.theory.stacks import digits
from torch_meanfield.theory.isometry import (
    critical_orthogonal_,
    delta_orthogonal_,
    edge_at,
    jacobian_moments,
    jacobian_spectrum,
)
from torch_meanfield.theory.phase import critical, phase


@pytest.mark.parametrize(("shape", "dim"), [((6, 4, 3), 1), ((6, 6, 3, 5), 2), ((8, 2, 3, 3, 1), 3)])
def test_delta_orthogonal_keeps_all_inner_products(shape, dim):
    weight = delta_orthogonal_(torch.empty(shape), gain=1.5, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, shape[1], *(7,) * dim)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[dim - 1]
    y = convolution(x, weight, padding=tuple(k // 2 for k in shape[2:]))
    assert torch.allclose(y.flatten(1) @ y.flatten(1).T, 2.25 * x.flatten(1) @ x.flatten(1).T, rtol=1e-4, atol=1e-3)


def test_delta_orthogonal_names_what_it_cannot_do_and_changes_nothing():
    weight = torch.randn(3, 4, 3, 3)
    before = weight.clone()
    with pytest.raises(ValueError, match="4 channels in and 3 out"):
        delta_orthogonal_(weight)
    with pytest.raises(ValueError, match="even size has no middle"):
        delta_orthogonal_(torch.empty(4, 4, 2, 2))
    with pytest.raises(ValueError, match="must be that of a convolution"):
        delta_orthogonal_(torch.empty(4, 4))
    with pytest.raises(ValueError, match="gain must be positive"):
        delta_orthogonal_(weight.transpose(0, 1), gain=0.0)
    assert torch.equal(weight, before)


def test_the_edge_at_a_length_is_the_edge_at_its_bias():
    edge = edge_at(torch.tanh, 0.57)
    again = critical(torch.tanh, edge.sigma_b)
    assert float(again.sigma_w) == pytest.approx(float(edge.sigma_w), rel=1e-9)
    assert float(again.q_star) == pytest.approx(0.57, rel=1e-9)
    assert float(phase(torch.tanh, edge.sigma_w, edge.sigma_b).chi_1) == pytest.approx(1, abs=1e-9)
    with pytest.raises(ValueError, match="q must be positive"):
        edge_at(torch.tanh, 0.0)
    with pytest.raises(ValueError, match="would need biases of variance -"):
        edge_at(lambda u: u + 1, 1.0)


def test_first_and_last_gradients_of_ten_thousand_layers_within_a_factor_of_two():
    depth, images, labels = 10_000, digits(8), torch.from_numpy(load_digits().target[:8])
    edge = edge_at(torch.tanh, 0.1 / depth)
    torch.manual_seed(0)
    model = DeepCNN(depth, 6, edge.q_star.item())
    isometric_(model, edge.sigma_w.item())
    norms = gradient_norms(model, images, labels)
    assert norms.isfinite().all() and 0.5 < float(norms[0] / norms[-1]) < 2
    assert float(norms.max() / norms.min()) < 2


@pytest.mark.parametrize("seed", range(2))
def test_a_deep_vanilla_cnn_learns_digits_and_with_he_weights_does_not(seed):
    """The same steps take one network far below the loss of a guess, log 10, and never bring the other down to it.

    With He weights the outputs are chaotic: the loss starts near 70 and jumps by tens from step to step, so that two of
    its values compare by chance, in another order on another processor.
    """
    depth, images, labels = 400, digits(16), torch.from_numpy(load_digits().target[:16])
    edge = edge_at(torch.tanh, 0.1 / depth)
    torch.manual_seed(seed)
    model = DeepCNN(depth, 6, edge.q_star.item())
    isometric_(model, edge.sigma_w.item())
    isometric = train(model, lambda step: (images, labels), 25, 0.04 / depth)
    he_(model)
    he = train(model, lambda step: (images, labels), 25, 0.04 / depth)
    assert isometric[-1] < math.log(10) / 5
    assert min(he) > 1.5 * math.log(10), "not even the best of the noisy losses is near a guess"


@pytest.mark.parametrize("weights", ["gaussian", "orthogonal"])
def test_moments_of_the_spectrum_of_real_networks(weights):
    torch.manual_seed(0)
    n, depth = 256, 8
    edge = edge_at(torch.tanh, 0.2)
    draw = {
        "gaussian": lambda: torch.randn(n, n) / n**0.5,
        "orthogonal": lambda: nn.init.orthogonal_(torch.empty(n, n)),
    }

    def spectrum():
        layers = [(edge.sigma_w.float() * draw[weights](), edge.sigma_b.float() * torch.randn(n)) for _ in range(depth)]

        def network(h):
            for w, b in layers:
                h = w @ h.tanh() + b
            return h

        return jacobian_spectrum(network, torch.randn(n) * edge.q_star.sqrt().float()).square()

    values = torch.cat([spectrum() for _ in range(4)])
    mean, variance = jacobian_moments(torch.tanh, edge.sigma_w, edge.q_star, depth, weights)
    assert float(values.mean()) == pytest.approx(float(mean), rel=0.1)
    assert float(values.var()) == pytest.approx(float(variance), rel=0.3)


def test_linear_networks_in_closed_form():
    assert jacobian_moments(torch.clone, 1.0, 1.0, 7, "orthogonal") == (1.0, 0.0)
    assert jacobian_moments(torch.clone, 1.0, 1.0, 7).variance.item() == pytest.approx(7)


@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}])
def test_recurrent_networks_are_on_their_edge(settings):
    torch.manual_seed(0)
    rnn = nn.RNN(8, 256, **settings)
    edges = critical_orthogonal_(rnn, input_scale=0.5, input_power=2.0)
    assert len(edges) == rnn.num_layers * (2 if rnn.bidirectional else 1)
    assert float(edges[0].sigma_b) == pytest.approx(math.sqrt(0.5), rel=1e-6)
    w = rnn.weight_hh_l0.detach().double()
    assert torch.allclose(w @ w.T, edges[0].sigma_w ** 2 * torch.eye(256, dtype=torch.float64), atol=1e-5)
    # the length that the recurrence keeps: pre-activations behind many steps
    with torch.no_grad():
        hidden = rnn(torch.randn(80, 64, 8) * 2**0.5)[0][30:-30]
    last = edges[-1]
    expected = (float(last.q_star) - float(last.sigma_b) ** 2) / float(last.sigma_w) ** 2  # E[phi^2]
    assert float(hidden.square().mean()) == pytest.approx(expected, rel=0.05)


def test_gradients_cross_hundreds_of_steps():
    torch.manual_seed(0)
    cell = nn.RNNCell(4, 64)
    edge = critical_orthogonal_(cell, input_scale=0.01)[0]
    start = (torch.randn(8, 64) * edge.q_star.sqrt().float()).tanh().requires_grad_()
    h = start
    for x in torch.randn(300, 8, 4):
        h = cell(x, h)
    ratio = [torch.autograd.grad((h * torch.randn_like(h)).sum(), start)[0].norm() / h.numel() ** 0.5]
    assert 0.3 < float(ratio[0]) < 3


def test_recurrent_networks_without_an_edge_are_named_and_unchanged():
    with pytest.raises(TypeError, match="got LSTM; gated cells"):
        critical_orthogonal_(nn.LSTM(3, 4))
    relu = nn.RNN(3, 4, nonlinearity="relu")
    before = relu.weight_hh_l0.detach().clone()
    with pytest.raises(ValueError, match="relu has no edge of chaos"):
        critical_orthogonal_(relu)
    assert torch.equal(relu.weight_hh_l0, before)
    with pytest.raises(ValueError, match="sigma_b must be finite and not negative"):
        critical_orthogonal_(nn.RNN(3, 4), sigma_b=-1.0)


def test_moments_and_spectrum_name_bad_input():
    with pytest.raises(ValueError, match="'gaussian' or 'orthogonal', got 'he'"):
        jacobian_moments(torch.tanh, 1.0, 1.0, 3, "he")
    with pytest.raises(ValueError, match="depth must be an integer of at least 1"):
        jacobian_moments(torch.tanh, 1.0, 1.0, 0)
    with pytest.raises(ValueError, match="floating point"):
        jacobian_spectrum(lambda x: x, torch.ones(2, dtype=torch.long))
