"""The expansion by powers of the horizon: closed forms, the orders of its errors; deep particles against a network."""

import math

import pytest
import torch
from torch import nn

from recipes.theory.expansion import errors, slope
from recipes.theory.flows import stack, swirl
from recipes.theory.zero_loss import DT, READOUT, STEPS, Y, Z, drawn, field, spread, trained
from torch_meanfield import MeanFieldSequential
from torch_meanfield.theory import horizon_expansion, train_deep_particles

X = swirl(32, 0)[0]


class Times(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, x):
        return self.a * x


def test_of_linear_blocks_the_terms_are_binomial():
    """(1 + a T / n)^n x: term k is binom(n, k) (a T / n)^k x."""
    layer = MeanFieldSequential(*(Times(2.0) for _ in range(6)), horizon=1.5)
    for k, term in enumerate(horizon_expansion(layer, X, 4)):
        torch.testing.assert_close(term, math.comb(6, k) * (2.0 * 1.5 / 6) ** k * X, rtol=1e-12, atol=0)


def test_the_second_term_is_the_sum_over_pairs():
    layer = stack(4, 3, horizon=1.0, seed=0).set_tau_([0.1, 0.4, 0.5, 1.0])
    terms, steps = horizon_expansion(layer, X), layer.steps().detach()
    first = sum(h * f(X) for h, f in zip(steps, layer, strict=True))
    torch.testing.assert_close(terms[1], first.detach())
    pairs = torch.zeros_like(X)
    for j in range(4):
        for i in range(j):
            change = torch.autograd.functional.jvp(layer[j], X, layer[i](X).detach())[1]
            pairs += steps[i] * steps[j] * change
    torch.testing.assert_close(terms[2], pairs)


def test_errors_fall_as_the_powers_of_the_horizon():
    layer = stack(5, 4, horizon=1.0, seed=1)
    for k, values in errors(layer, X, 2).items():
        assert slope(values) == pytest.approx(k + 1, abs=0.05)


def test_deep_particles_are_a_network_under_sgd():
    theta = drawn(1, 3, 4, 0)[0]
    outputs, final = train_deep_particles(field, theta, Z, Y, READOUT, dt=DT, steps=4)
    weights = nn.Parameter(theta.clone())
    optimizer = torch.optim.SGD([weights], lr=DT * 12)
    for step in range(5):
        z = Z
        for layer in weights:
            z = z + sum(torch.tanh(z @ u[2:4] + u[4])[:, None] * u[:2] for u in layer) / 12
        f = z @ READOUT
        torch.testing.assert_close(outputs[step], f.detach())
        if step < 4:
            optimizer.zero_grad()
            ((f - Y).square().mean() / 2).backward()
            optimizer.step()
    torch.testing.assert_close(final, weights.detach())


def test_the_gap_shrinks_with_width_and_depth():
    limit = trained(spread(4, 2**9), STEPS)
    scaled = []
    for units in (16, 128):
        f = trained(drawn(60, 4, units, units), STEPS)
        scaled.append(4 * units * (f - limit[:, None])[-1].square().mean().item())
    assert scaled[1] == pytest.approx(scaled[0], rel=0.4)  # 60 networks, an eighth of the units
    deepest = trained(spread(64, 64), STEPS)[-1]
    gaps = [(trained(spread(n, 64), STEPS)[-1] - deepest).norm().item() for n in (4, 8)]
    assert gaps[0] / gaps[1] == pytest.approx(2 * (1 - 4 / 64) / (1 - 8 / 64), rel=0.1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: horizon_expansion(nn.Linear(2, 2), X), TypeError, "MeanFieldSequential"),
        (lambda: horizon_expansion(stack(2, 2, horizon=1.0, seed=0), X, 5), ValueError, "order must be"),
        (
            lambda: horizon_expansion(MeanFieldSequential(Times(1.0), solver=lambda x, f, h: x), X),
            ValueError,
            "solver of its own",
        ),
        (lambda: train_deep_particles(field, Z, Z, Y, READOUT, dt=0.1, steps=1), ValueError, "theta must be"),
        (lambda: train_deep_particles(field, spread(1, 2), Z, Y, Y, dt=0.1, steps=1), ValueError, "readout"),
        (lambda: train_deep_particles(field, spread(1, 2), Z, Y, READOUT, dt=0.0, steps=1), ValueError, "dt"),
        (lambda: train_deep_particles(field, spread(1, 2), Z, Y, READOUT, dt=0.1, steps=-1), ValueError, "steps"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
