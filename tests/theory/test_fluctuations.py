"""Law of large numbers and central limit theorem of two-layer networks."""

import pytest
import torch
from torch import nn

from recipes.theory.fluctuations import DT, STEPS, X, Y, limit, normality, trained, unit
from torch_meanfield.theory.fluctuations import (
    fluctuation_covariance,
    gaussian_particles,
    monte_carlo_variance,
    train_particles,
)


@pytest.fixture(scope="module")
def mean_field():
    return limit(2**14, seed=0)


@pytest.fixture(scope="module")
def covariance():
    return fluctuation_covariance(unit, gaussian_particles(2**13, 3), X, Y, dt=DT, steps=STEPS)


def test_n_times_the_squared_deviation_is_flat_and_as_predicted(mean_field, covariance):
    for n, networks in ((50, 400), (500, 100)):
        scaled = n * (trained(n, networks, seed=n)[-1] - mean_field[0][-1]).square().mean()
        assert scaled.item() == pytest.approx(covariance.diagonal().mean().item(), rel=0.15)


def test_deviations_are_normal(mean_field, covariance):
    n = 500
    deviation = n**0.5 * (trained(n, 300, seed=0)[-1] - mean_field[0][-1])
    _, ks, pearson = normality(deviation, covariance)
    assert ks > 0.05 and pearson > 0.05
    _, wrong, _ = normality(deviation, 1.5 * covariance)  # the test can tell
    assert wrong < 0.05


def test_at_the_start_it_is_the_variance_of_a_unit():
    theta = gaussian_particles(2**11, 3)
    start = fluctuation_covariance(unit, theta, X, Y, dt=DT, steps=0)
    torch.testing.assert_close(start.diagonal().mean(), monte_carlo_variance(unit, theta, X))


def test_the_bound_on_the_long_run(mean_field, covariance):
    """Rotskoff 2020, (32): training leaves less than independent draws from the trained measure would have."""
    assert covariance.diagonal().mean() < monte_carlo_variance(unit, mean_field[1], X)


def test_against_central_differences():
    """The covariance's psi is the derivative of the trained outputs by the weight of a particle."""
    theta = gaussian_particles(16, 3)
    weights = torch.rand(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights /= weights.sum()
    psi = []
    for j in range(16):
        ends = []
        for sign in (1, -1):
            moved = weights.clone()
            moved[j] += sign * 1e-6
            ends.append(train_particles(unit, theta, X, Y, dt=DT, steps=10, weights=moved)[0][-1])
        psi.append((ends[0] - ends[1]) / 2e-6)
    centred = torch.stack(psi, 1)
    centred = centred - (centred @ weights)[:, None]
    found = fluctuation_covariance(unit, theta, X, Y, dt=DT, steps=10, weights=weights)
    torch.testing.assert_close(found, (centred * weights) @ centred.T, rtol=1e-5, atol=1e-8)


def test_particles_are_a_network_under_sgd():
    theta = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = nn.Parameter(theta.clone())
    optimizer = torch.optim.SGD([weights], lr=7 * DT)
    outputs, final = train_particles(unit, theta, X, Y, dt=DT, steps=5)
    for step in range(6):
        f = unit(X, weights).mean(-1)
        torch.testing.assert_close(outputs[step], f.detach())
        if step < 5:
            optimizer.zero_grad()
            ((f - Y).square().mean() / 2).backward()
            optimizer.step()
    torch.testing.assert_close(final, weights.detach())


def test_normal_particles_have_the_moments():
    theta = gaussian_particles(2**12, 2)
    torch.testing.assert_close(theta.T @ theta / len(theta), torch.eye(2).double(), atol=2e-3, rtol=0)
    assert theta.pow(4).mean().item() == pytest.approx(3, rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": 0.0}, "dt"),
        ({"steps": -1}, "steps"),
        ({"weights": torch.ones(3)}, "weights"),
        ({"theta": torch.ones(3)}, "theta"),
        ({"y": torch.ones(2)}, "x must be"),
        ({"unit": lambda x, theta: theta}, "unit must map"),
    ],
)
def test_bad_arguments(change, message):
    good = {"unit": unit, "theta": torch.ones(4, 3, dtype=torch.float64), "x": X, "y": Y, "dt": 0.1, "steps": 1}
    with pytest.raises(ValueError, match=message):
        train_particles(**(good | change))
    with pytest.raises(ValueError, match="power of 2, got 12; 16"):
        gaussian_particles(12, 3)
