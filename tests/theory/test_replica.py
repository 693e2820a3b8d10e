"""The generalisation gap of ridge regression on frozen features: closed forms, saddle point, finite samples."""

import math

import pytest
import torch

from recipes.theory.replica import NOISE, compare, frozen, random_features, ridge_errors, trained_features
from torch_meanfield.theory.replica import FeatureMoments, random_feature_moments, ridge_generalisation


def white(p, signal=1.0, noise=0.3):
    """White features, a linear teacher of this power, and noise."""
    phi = torch.full((p,), math.sqrt(signal / p), dtype=torch.float64)
    return FeatureMoments(torch.eye(p, dtype=torch.float64), phi, torch.tensor(signal + noise, dtype=torch.float64))


def test_white_features_have_closed_forms():
    """Without a ridge: noise / (1 - p/n), or signal (1 - n/p) + noise / (1 - n/p) beyond interpolation."""
    n = torch.tensor([150.0, 400.0, 50.0, 20.0], dtype=torch.float64)
    found = ridge_generalisation(white(100), n, 1e-10)
    few = n < 100
    exact = torch.where(few, (1 - n / 100) + 0.3 / (1 - n / 100), 0.3 / (1 - 100 / n))
    torch.testing.assert_close(found.test, exact, rtol=1e-8, atol=0)
    training = torch.where(few, torch.zeros(4).double(), 0.3 * (1 - 100 / n))
    torch.testing.assert_close(found.train, training, rtol=1e-8, atol=1e-10)


def test_the_overlap_of_ridge_regression():
    """1 - lambda g with 1/g = lambda + alpha / (1 + g), for samples over sqrt(d): alpha 3, lambda 0.5, 0.8139."""
    d = 200
    moments = FeatureMoments(torch.eye(d).double() / d, torch.ones(d).double() / d, torch.tensor(1.0).double())
    overlap = ridge_generalisation(moments, torch.tensor([3.0 * d]), 0.5).overlap.item()
    g = (1 - overlap) / 0.5
    assert 1 / g == pytest.approx(0.5 + 3 / (1 + g), rel=1e-9)
    assert overlap == pytest.approx(0.8139, abs=5e-5)


def coloured(p=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(p, p, generator=generator, dtype=torch.float64)
    omega = root @ root.T / p
    return FeatureMoments(
        omega, omega @ torch.randn(p, generator=generator, dtype=torch.float64) / 8, torch.tensor(2.0).double()
    )


def test_it_solves_the_replica_saddle_point():
    """The six equations of the source, iterated as they stand, for coloured features."""
    (omega, phi, rho), n, ridge = coloured(), 80.0, 0.7
    eye, v, q, m = torch.eye(60, dtype=torch.float64), 1.0, 1.0, 0.0
    for _ in range(3000):
        v_hat, m_hat, q_hat = n / (1 + v), n / (1 + v), n * (rho - 2 * m + q) / (1 + v) ** 2
        inverse = torch.linalg.inv(ridge * eye + v_hat * omega)
        v = torch.trace(omega @ inverse)
        m = m_hat * phi @ inverse @ phi
        square = inverse @ omega @ inverse
        q = m_hat**2 * phi @ square @ phi + q_hat * torch.trace(omega @ square)
    found = ridge_generalisation(coloured(), torch.tensor([n]), ridge)
    assert found.overlap.item() == pytest.approx(float(m), rel=1e-9)
    assert found.norm.item() == pytest.approx(float(q), rel=1e-9)
    assert found.test.item() == pytest.approx(float(rho - 2 * m + q), rel=1e-9)
    assert found.train.item() == pytest.approx(float((rho - 2 * m + q) / (1 + v) ** 2), rel=1e-9)
    assert found.effective_ridge.item() == pytest.approx(ridge / float(v_hat), rel=1e-9)


def test_many_samples_have_the_universal_gap():
    moments = coloured()
    best = moments.power - moments.correlation @ torch.linalg.solve(moments.covariance, moments.correlation)
    n = torch.tensor([1e5, 1e6], dtype=torch.float64)
    gap = ridge_generalisation(moments, n, 1e-6).gap
    torch.testing.assert_close(gap * n / 60, 2 * best.expand(2), rtol=2e-3, atol=0)


@pytest.mark.parametrize(("p", "ridge"), [(100, 1.0), (240, 1.0), (400, 0.1)])
def test_random_features_at_finite_size(p, ridge):
    """Dimension 200, 250 samples, 16 draws: within four standard errors, which are small."""
    weights, teacher = frozen(200, p, seed=0)
    moments = random_feature_moments(weights, torch.tanh, teacher, noise=NOISE)
    found = ridge_generalisation(moments, torch.tensor([250]), ridge)
    mean, error = compare(random_features(weights, teacher, torch.Generator().manual_seed(1)), 250, [ridge], 16)
    for k, predicted in enumerate((found.test, found.train)):
        assert abs(float(mean[k, 0] - predicted)) < 4 * float(error[k, 0]) + 0.01 * float(predicted)
        assert float(error[k, 0]) < 0.1 * float(predicted)  # the test can tell


def test_double_descent():
    """The error rises towards as many features as samples, and falls beyond."""
    errors = []
    for p in (100, 245, 800):
        weights, teacher = frozen(200, p, seed=0)
        moments = random_feature_moments(weights, torch.tanh, teacher, noise=NOISE)
        errors.append(ridge_generalisation(moments, torch.tensor([250]), 1e-3).test.item())
    assert errors[1] > 5 * errors[0] and errors[2] < errors[0]


def test_moments_of_random_features():
    weights, teacher = frozen(100, 30, seed=3)
    for activation in (torch.tanh, torch.relu):
        moments = random_feature_moments(weights, activation, teacher, noise=0.5)
        x = torch.randn(60_000, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 10
        v, y = activation(x @ weights.T), x @ teacher
        torch.testing.assert_close(v.T @ y / len(v), moments.correlation, rtol=0, atol=0.015)
        torch.testing.assert_close(v.T @ v / len(v), moments.covariance, rtol=0, atol=0.03)
        assert moments.power.item() == pytest.approx(1.5)


def test_a_trained_network():
    draw, moments = trained_features(seed=0)
    found = ridge_generalisation(moments, torch.tensor([400]), 1.0)
    runs = torch.stack([ridge_errors(draw, 400, [1.0], fresh=4000) for _ in range(8)]).mean(0)
    assert runs[0, 0].item() == pytest.approx(found.test.item(), rel=0.06)
    assert runs[1, 0].item() == pytest.approx(found.train.item(), rel=0.06)


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        (white(3)._replace(covariance=torch.ones(2, 3)), r"covariance must be \(p, p\)"),
        (white(2)._replace(covariance=torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "symmetric"),
        (white(2)._replace(covariance=torch.diag(torch.tensor([1.0, -1.0]))), "negative eigenvalue -1"),
        (white(2)._replace(power=torch.tensor(0.5)), "explain 1 of it"),
    ],
)
def test_bad_moments(moments, message):
    with pytest.raises(ValueError, match=message):
        ridge_generalisation(moments, torch.tensor([10]), 1.0)


def test_bad_arguments():
    with pytest.raises(ValueError, match="samples"):
        ridge_generalisation(white(2), torch.tensor([0]), 1.0)
    with pytest.raises(ValueError, match="ridge"):
        ridge_generalisation(white(2), torch.tensor([5]), 0.0)
    with pytest.raises(ValueError, match="row 1 of weights is zero"):
        random_feature_moments(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tanh, torch.ones(2))
    with pytest.raises(ValueError, match="teacher"):
        random_feature_moments(torch.ones(3, 2), torch.tanh, torch.ones(3))
    with pytest.raises(ValueError, match="noise is a variance"):
        random_feature_moments(torch.ones(3, 2), torch.tanh, torch.ones(2), noise=-1.0)
    with pytest.raises(ValueError, match="is enough for 5"):
        random_feature_moments(torch.ones(6, 2), torch.tanh, torch.ones(2), max_bytes=1000)
    with pytest.raises(ValueError, match="element-wise"):
        random_feature_moments(torch.ones(3, 2), lambda x: x.softmax(-1), torch.ones(2))
