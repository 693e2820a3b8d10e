"""Signal propagation: known critical points, closed forms, a network of width 4,096, and bad input."""

import math

import pytest
import torch
from torch import nn

from recipes.theory.wide import Setting, measure
from torch_meanfield.theory.phase import critical, phase
from torch_meanfield.theory.signal import correlation_map, length_map, propagate


def test_relu_is_critical_at_two_and_zero():
    edge = critical(torch.relu)
    assert float(edge.sigma_w) ** 2 == pytest.approx(2, abs=1e-8)
    with pytest.raises(ValueError, match="relu has no edge of chaos at sigma_b=0.1"):
        critical(torch.relu, 0.1)


def test_tanh_is_critical_where_published():
    """sigma_b^2 = 0.05: sigma_w^2 = 1.76 (Schoenholz et al. 2017); without biases at 1."""
    assert float(critical(torch.tanh, math.sqrt(0.05)).sigma_w) ** 2 == pytest.approx(1.76, abs=5e-3)
    assert float(critical(torch.tanh).sigma_w) == pytest.approx(1, abs=1e-6)


def test_erf_is_critical_where_the_closed_form_says():
    """E[erf'^2] = (4 / pi) / sqrt(1 + 4q), E[erf^2] = (2 / pi) asin(2q / (1 + 2q))."""
    edge = critical(torch.erf, 0.3)
    q = float(edge.q_star)
    w2 = math.pi / 4 * math.sqrt(1 + 4 * q)
    assert float(edge.sigma_w) ** 2 == pytest.approx(w2, rel=1e-9)
    assert w2 * 2 / math.pi * math.asin(2 * q / (1 + 2 * q)) + 0.09 == pytest.approx(q, rel=1e-9)


def test_the_edge_is_differentiable_in_sigma_b():
    b = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(critical(torch.tanh, b).sigma_w, b)
    around = [float(critical(torch.tanh, 0.2 + e).sigma_w) for e in (1e-4, -1e-4)]
    assert float(slope) == pytest.approx((around[0] - around[1]) / 2e-4, rel=1e-5)


def test_relu_phases_in_closed_form():
    ordered = phase(torch.relu, 1.0, 0.3)
    assert float(ordered.q_star) == pytest.approx(2 * 0.09 / (2 - 1))
    # Two ways of computing 1 / log 2, whose last bit depends on the processor.
    assert float(ordered.xi_c) == pytest.approx(1 / math.log(2), rel=1e-12)
    assert float(ordered.xi_q) == pytest.approx(1 / math.log(2), rel=1e-12)
    assert (ordered.name, float(ordered.c_star)) == ("ordered", 1.0)
    marginal = phase(torch.relu, math.sqrt(2), q=3.0)
    assert (marginal.name, float(marginal.q_star), float(marginal.xi_c)) == ("critical", 3.0, math.inf)
    assert float(phase(torch.relu, 1.5).q_star) == math.inf


def test_fixed_points_are_where_the_recurrence_ends_and_depth_scales_its_rate():
    for sigma_w, name in ((1.1, "ordered"), (2.0, "chaotic")):
        limit = phase(torch.tanh, sigma_w, 0.3)
        track = propagate(torch.tanh, 80, sigma_w, 0.3, q=0.5, c=0.1)
        assert limit.name == name
        assert torch.allclose(track.q[-1], limit.q_star, rtol=1e-9)
        assert torch.allclose(track.c[-1], limit.c_star, rtol=1e-4)
        ratio = (track.c[26] - limit.c_star) / (track.c[25] - limit.c_star)
        assert float(-1 / ratio.log()) == pytest.approx(float(limit.xi_c), rel=2e-2)
        ratio = (track.q[8] - limit.q_star) / (track.q[7] - limit.q_star)
        assert float(-1 / ratio.log()) == pytest.approx(float(limit.xi_q), rel=2e-2)


def test_a_diagram_holds_what_single_settings_give():
    w, b = torch.tensor([0.8, 1.7, 3.0]), torch.tensor([0.1, 0.5])
    grid = phase(torch.tanh, w[:, None], b)
    assert grid.chi_1.shape == (3, 2)
    one = phase(torch.tanh, w[2], b[0])
    for name in ("q_star", "c_star", "chi_1", "xi_q", "xi_c"):
        assert torch.allclose(getattr(grid, name)[2, 0], getattr(one, name), rtol=1e-7)
    with pytest.raises(ValueError, match="a name is for one setting, here are 6"):
        grid.name  # noqa: B018


def test_maps_are_differentiable_in_all_they_take():
    q, c, w, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.8, 0.4, 1.3, 0.2))
    assert torch.autograd.gradcheck(lambda *t: length_map(torch.tanh, *t), (q, w, b))
    assert torch.autograd.gradcheck(lambda c, w, b, q: correlation_map(torch.tanh, c, w, b, q=q), (c, w, b, q))


def test_two_inputs_of_different_length():
    got = correlation_map(torch.relu, 0.3, 1.4, 0.0, q=1.0, q2=9.0)  # the ReLU's map does not depend on lengths
    assert torch.allclose(got, correlation_map(torch.relu, 0.3, 1.4, q=1.0))


def test_networks_of_width_4096_follow_within_two_percent_over_thirty_layers():
    settings = (
        Setting("ordered", torch.tanh, 1.1, 0.3, 2.0, 0.2),
        Setting("chaotic", torch.tanh, 2.0, 0.3, 0.5, 0.9),
        Setting("kinked", torch.relu, 1.2, 0.5, 3.0, 0.2),
    )
    q, c = measure(settings, width=4096, depth=30, networks=24, seed=0)
    for s, lengths, correlations in zip(settings, q, c, strict=True):
        predicted = propagate(s.activation, 30, s.sigma_w, s.sigma_b, q=s.q, c=s.c)
        assert float((lengths / predicted.q - 1).abs().max()) < 0.02
        assert float((correlations - predicted.c).abs().max()) < 0.02


def test_random_signs_stand_for_networks_of_their_own():
    """The same mean and spread of q as networks drawn one by one have."""
    s = Setting("tanh", torch.tanh, 1.3, 0.2, 1.0, 0.0)
    together = measure((s,), width=128, depth=4, networks=200, seed=1)[0][0]
    alone = torch.stack([measure((s,), width=128, depth=4, networks=1, seed=k)[0][0] for k in range(200)]).mean(0)
    assert float((together / alone - 1).abs().max()) < 0.03


@pytest.mark.parametrize(
    ("activation", "error", "message"),
    [
        (nn.Softmax(-1), ValueError, "Softmax is not element-wise"),
        (nn.GLU(), ValueError, "GLU is not element-wise"),
        (nn.Dropout(0.5), ValueError, "Dropout is not element-wise"),
        (nn.LayerNorm(6).double(), TypeError, "LayerNorm cannot be applied"),
        (nn.PReLU(), TypeError, "needs .double()"),
        ("relu", TypeError, "must be a callable"),
    ],
)
def test_an_activation_that_is_not_element_wise_is_named(activation, error, message):
    for call in (
        lambda: length_map(activation, 1.0, 1.0),
        lambda: phase(activation, 1.0),
        lambda: critical(activation),
    ):
        with pytest.raises(error, match=message):
            call()


def test_in_place_activations_give_what_others_give():
    assert torch.equal(phase(nn.ReLU(inplace=True), 1.2, 0.1).xi_c, phase(torch.relu, 1.2, 0.1).xi_c)


def test_rounding_does_not_make_an_activation_depend_on_other_entries():
    """Softplus differs in the last bit between vectorised code and its remainder."""
    assert float(length_map(nn.Softplus(), 0.0, 1.0)) == pytest.approx(math.log(2) ** 2, rel=1e-12)


def test_numbers_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="q must be finite and not negative .a variance., got -1"):
        length_map(torch.tanh, -1.0, 1.0)
    with pytest.raises(ValueError, match="sigma_w must be finite and not negative"):
        phase(torch.tanh, -1.0)
    with pytest.raises(ValueError, match="sigma_b must be finite"):
        critical(torch.tanh, float("nan"))
    with pytest.raises(ValueError, match="c must be a correlation"):
        correlation_map(torch.tanh, 1.2, 1.0, q=1.0)
    with pytest.raises(ValueError, match="depth must be an integer of at least 0, got -1"):
        propagate(torch.tanh, -1, 1.0)
    with pytest.raises(ValueError, match="single numbers"):
        critical(torch.tanh, torch.tensor([0.1, 0.2]))
