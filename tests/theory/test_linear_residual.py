"""Residuals linear in their weights: the start in closed form, the kernel by autograd, the inequality, the rate."""

import math

import pytest
import torch

from recipes.theory.linear_residual import accuracy, components, descend
from torch_meanfield.theory.linear_residual import LinearResNet, polyak_lojasiewicz
from torch_meanfield.theory.ntk import empirical_ntk

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(8, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def moved(seed=0, **options):
    model = LinearResNet(5, 2, layers=4, features=60, seed=seed, **options)
    with torch.no_grad():
        model.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def test_at_the_start_both_constants_are_that_of_the_features():
    """Weights of 0, orthonormal rows of B: the tangent kernel is the mean kernel of features, once for each output."""
    model = LinearResNet(5, 2, layers=1, features=60)
    phi = model.features(X, 0).detach()
    expected = float(torch.linalg.eigvalsh(phi @ phi.T)[0]) / 8
    found = polyak_lojasiewicz(model, X)
    assert [float(c) for c in found] == pytest.approx([expected, expected], rel=1e-9)


def test_many_features_have_the_gaussian_kernel():
    model = LinearResNet(5, 2, layers=1, features=200_000, length=1.7)
    phi = model.features(X, 0).detach()
    kernel = torch.exp(-torch.cdist(X, X).square() / (2 * 1.7**2))
    torch.testing.assert_close(phi @ phi.T, kernel, rtol=0, atol=0.015)


def test_the_tangent_constant_is_that_of_the_empirical_kernel():
    model = moved()
    kernel = len(model.weight) * empirical_ntk(model, X)  # the scaling of depth
    expected = torch.linalg.eigvalsh(kernel)[0] / 8
    torch.testing.assert_close(polyak_lojasiewicz(model, X).tangent, expected, rtol=1e-7, atol=1e-12)


def test_the_inequality_holds_and_is_reached():
    model = moved(seed=3)
    constants = polyak_lojasiewicz(model, X)
    assert 0 < constants.bound <= constants.tangent

    def ratio(targets):
        loss = (model(X) - targets).square().sum() / 16
        (gradient,) = torch.autograd.grad(loss, model.weight)
        return 4 * float(gradient.square().sum()) / (2 * float(loss.detach()))

    for seed in range(20):
        targets = torch.randn(8, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert ratio(targets) >= float(constants.tangent)
    kernel = 4 * empirical_ntk(model, X)
    worst = torch.linalg.eigh(kernel)[1][:, 0].view(8, 2)
    assert ratio(model(X).detach() - worst) == pytest.approx(float(constants.tangent), rel=1e-6)


def test_gradient_descent_ends_at_the_rate():
    x, y = X[:6], 0.3 * Y[:6]
    model = LinearResNet(5, 2, layers=5, features=100, length=1.5)
    losses, seen = descend(model, x, y, dt=2.0, steps=300, records=6)
    for _, ratio, tangent, bound in seen:
        assert ratio >= tangent * (1 - 1e-9) and tangent >= bound
    expected = -math.log1p(-2.0 * seen[-1][2]) / 2.0
    assert math.log(losses[-51] / losses[-1]) / (2 * 2.0 * 50) == pytest.approx(expected, rel=0.05)
    assert losses[-1] < 1e-3 * losses[0]


def test_training_the_features_is_possible():
    """The recipe's comparison runs, on two blobs that any of the two tells apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    pixels = torch.randn(200, 12, generator=generator, dtype=torch.float64) + 2.0 * labels[:, None]
    data = tuple((part, labels) for part in components(pixels, pixels, 10))
    for train_features in (False, True):
        assert accuracy(*data, 2, train_features=train_features, seed=0, epochs=200) > 0.95


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LinearResNet(5, 6, 1, 10), "outputs must be at most dim=5"),
        (lambda: LinearResNet(5, 2, 0, 10), "layers must be a positive integer, got 0"),
        (lambda: LinearResNet(5, 2, 1, 10, length=0.0), "length must be positive"),
        (lambda: polyak_lojasiewicz(moved(), X[:, :3]), r"x must be \(N, 5\), got shape \(8, 3\)"),
        (
            lambda: polyak_lojasiewicz(moved(), X, max_bytes=1_000),
            "takes 2,048 bytes, more than max_bytes=1,000; 5 fit",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
