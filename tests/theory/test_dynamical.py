"""Dynamical mean-field theory of SGD: closed forms, published values, finite networks."""

import math

import pytest
import torch

from recipes.theory.dynamical import (
    BATCHES,
    DATA,
    PUBLISHED,
    TEACHER,
    THREE,
    TWO,
    WAYS,
    Problem,
    door,
    logistic,
    measure,
    predict,
    square,
)
from torch_meanfield.theory.dynamical import dynamical_mean_field
from torch_meanfield.theory.latents import Latents, gaussian_mixture, mixture_error, teacher_student


def spectrum(ratio, nodes=4000):
    """The law of Marchenko and Pastur of X^T X / d for ratio above 1: nodes and weights."""
    low, high = (math.sqrt(ratio) - 1) ** 2, (math.sqrt(ratio) + 1) ** 2
    angle = (torch.arange(nodes, dtype=torch.float64) + 0.5) * math.pi / nodes
    x = (low + high) / 2 + (high - low) / 2 * angle.cos()
    return x, ((high - low) / 2 * angle.sin()).square() / (2 * math.pi * x) * math.pi / nodes


def test_least_squares_is_exact():
    """Each eigendirection relaxes by itself; the memory, the response and the noise must add up to that."""
    found = predict(TEACHER, 256)
    x, w = spectrum(3.0)
    end = x / (0.5 + x)
    k = torch.arange(31)[:, None]
    m = end + (1 - 0.1 * (0.5 + x)) ** k * (0.2 - end)
    rest = (1 - 0.1 * (0.5 + x)) ** (2 * k) * 0.96  # of the part of w across v
    torch.testing.assert_close(found.overlap, m @ w, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.norm, (m.square() + rest) @ w, rtol=0, atol=1e-9)
    torch.testing.assert_close(3 * found.loss, (x * ((1 - m).square() + rest) / 2) @ w, rtol=0, atol=1e-9)


def test_published_values_of_least_squares():
    """Within 0.5 %, the published ones being of sampled paths; the first step and the end also in closed form."""
    found = predict(TEACHER, 256).overlap
    for t, value in PUBLISHED.items():
        assert found[round(10 * t)].item() == pytest.approx(value, rel=5e-3)
    assert found[1].item() == pytest.approx(0.43, abs=1e-12)
    late = predict(TEACHER._replace(settings=TEACHER.settings | {"steps": 100}), 512).overlap[-1].item()
    g = (1 - late) / 0.5
    assert 1 / g == pytest.approx(0.5 + 3 / (1 + g), rel=1e-6)
    assert late == pytest.approx(0.8139, abs=5e-5)


def test_published_error_of_logistic_regression():
    """Two clusters, variance 0.5, decay 0.01, n / d = 0.1674: 0.2478 at the end of training."""
    found = dynamical_mean_field(
        logistic, gaussian_mixture(0.5), ratio=0.1674, rate=4.0, steps=60, decay=0.01, norm=0.0, paths=512
    )
    error = mixture_error(found.overlap[1:], found.norm[1:], 0.5)
    assert error[-1].item() == pytest.approx(0.2478, rel=0.01)


CASES = [
    (TEACHER, 0.03),
    (Problem(gaussian_mixture(**DATA[0]), logistic, TWO | BATCHES["b = 0.2"]), 0.04),
    (Problem(gaussian_mixture(**DATA[1]), door, THREE | WAYS["persistent SGD, b = 0.3"]), 0.05),
]


@pytest.mark.parametrize(("problem", "within"), CASES)
def test_a_network_follows(problem, within):
    found = predict(problem, 1024)
    measured = torch.stack([torch.stack(measure(problem, 500, seed)) for seed in range(6)]).mean(0)
    for line, curve in zip(measured, (found.overlap, found.norm, found.loss), strict=True):
        assert (line - curve).abs().max() < within * curve.abs().max()


def test_batches_matter():
    """The noise of small batches is in the equations: without it the norm would be missed."""
    full, small = (
        predict(Problem(gaussian_mixture(**DATA[0]), logistic, TWO | BATCHES[k]), 512)
        for k in BATCHES
        if "0.5" not in k
    )
    assert small.norm[-1] > 1.03 * full.norm[-1]


def test_samples_are_those_of_the_mixture():
    normal = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signal, variance, label = gaussian_mixture(0.2, outer=0.3)(normal)
    assert (label > 0).double().mean().item() == pytest.approx(0.3, abs=0.01)
    assert signal.square().mean().item() == pytest.approx(0.3 + 0.2, rel=0.02)
    assert (variance == 0.2).all()
    # a read-out with overlap 0.8 and norm 1.5
    h = 0.8 * signal + (0.2 * (1.5 - 0.64)) ** 0.5 * torch.randn(len(signal), dtype=torch.float64)
    measured = ((h.abs() > 0.5) != (label > 0)).double().mean()
    m, q = torch.tensor([0.8, 1.5], dtype=torch.float64)
    assert mixture_error(m, q, 0.2, outer=0.3, threshold=0.5).item() == pytest.approx(measured.item(), abs=0.005)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 0.0}, "ratio"),
        ({"rate": -1.0}, "rate"),
        ({"steps": -1}, "steps"),
        ({"decay": math.nan}, "decay"),
        ({"norm": 0.1, "overlap": 0.5}, r"overlap\^2 = 0.25.*variance"),
        ({"batch": 0.0}, "batch"),
        ({"batch": 0.1, "persistence": 0.5}, "persistence must be at least 0.9"),
        ({"paths": 100}, "power of 2"),
        ({"steps": 100, "paths": 256}, "take 512"),
        ({"steps": 10, "paths": 1024, "max_bytes": 1 << 20}, "enough for 512"),
        ({"loss": lambda h, y: (h - y).square().mean()}, "element by element"),
        ({"loss": lambda h, y: (1 - y * h).relu()}, "piecewise linear.*softplus"),
        ({"source": lambda z: Latents(z[:, 0], -z[:, 0].abs(), z[:, 1])}, "variances must be at least 0"),
        ({"source": lambda z: Latents(z, z, z)}, r"source must make \(N,\)"),
    ],
)
def test_bad_arguments(change, message):
    good = {"loss": square, "source": teacher_student(), "ratio": 1.0, "rate": 0.1, "steps": 3}
    with pytest.raises(ValueError, match=message):
        dynamical_mean_field(**(good | change))


def test_the_number_of_paths_that_fits_fits():
    settings = {"ratio": 1.0, "rate": 0.1, "steps": 10, "max_bytes": 1 << 20}
    assert dynamical_mean_field(square, teacher_student(), paths=512, **settings).loss.isfinite().all()


def test_bad_data_and_divergence():
    with pytest.raises(ValueError, match="variance"):
        gaussian_mixture(-0.1)
    with pytest.raises(ValueError, match="outer"):
        gaussian_mixture(0.1, outer=0.0)
    with pytest.raises(ValueError, match="noise is a variance"):
        teacher_student(-1.0)
    with pytest.raises(ValueError, match="norm must be positive"):
        mixture_error(torch.zeros(1), torch.zeros(1), 0.5)
    with pytest.raises(RuntimeError, match="diverges at step"):
        dynamical_mean_field(square, teacher_student(), ratio=1.0, rate=1e9, steps=60, paths=256)
