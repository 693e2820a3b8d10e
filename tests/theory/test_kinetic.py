"""Residual networks as a kinetic equation: moments, steady states, finite volumes, particles."""

import math

import pytest
import torch

from recipes.theory.kinetic import DEPTHS, EDGES, HORIZON, network, shares, stream, total_variation
from torch_meanfield.theory.kinetic import fit_linear, fokker_planck, linear_moments, steady_state

CENTRE = (EDGES[1:] + EDGES[:-1]) / 2


def gaussian(mean, variance):
    """Shares of the cells by the distribution function, the outermost to infinity."""
    z = (EDGES[1:-1] - mean) / variance**0.5
    cdf = torch.cat([torch.zeros(1), torch.special.ndtr(z), torch.ones(1)]).double()
    return cdf.diff()


def test_published_moments():
    t = torch.linspace(0, 3, 7, dtype=torch.float64)
    plain = linear_moments(t, weight=-1.0, bias=0.0, mean=0.7, variance=1.3)
    torch.testing.assert_close(plain.first, 0.7 * torch.exp(-t), rtol=1e-12, atol=0)
    torch.testing.assert_close(plain.second, (1.3 + 0.49) * torch.exp(-2 * t), rtol=1e-12, atol=0)
    shifted = linear_moments(torch.tensor([40.0]), weight=-1.0, bias=2.5, mean=0.7, variance=1.3)
    assert shifted.first.item() == pytest.approx(2.5, abs=1e-12)
    assert shifted.second.item() == pytest.approx(6.25, abs=1e-12)


@pytest.mark.parametrize(("weight", "bias", "noise"), [(-1.0, 0.5, 0.0), (0.0, 0.3, 0.7), (0.4, -0.2, 1.0)])
def test_moments_solve_their_equations(weight, bias, noise):
    """Central differences of the closed form against the right-hand sides."""
    t, h = torch.linspace(0.1, 2, 5, dtype=torch.float64), 1e-5
    known = {"weight": weight, "bias": bias, "mean": 0.6, "variance": 0.8, "noise": noise}
    m, late, early = (linear_moments(s, **known) for s in (t, t + h, t - h))
    slope1, slope2 = ((a - b) / (2 * h) for a, b in zip(late, early, strict=True))
    torch.testing.assert_close(slope1, weight * m.first + bias, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(slope2, 2 * weight * m.second + 2 * bias * m.first + noise**2, rtol=1e-7, atol=1e-8)


def test_a_deep_network_has_these_moments():
    """Euler's error falls with the number of blocks."""
    x = 1 + 0.5 * torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = {"weight": -1.0, "bias": 1.0, "mean": float(x.mean()), "variance": float(x.var(correction=0))}
    errors = []
    for blocks in (100, 200):
        measured = torch.stack([s.square().mean() for s in stream(network(lambda z: z, -1.0, 1.0, blocks=blocks), x)])
        times = torch.linspace(0, HORIZON, blocks + 1, dtype=torch.float64)
        errors.append(float((measured - linear_moments(times, **known).second).abs().max()))
    assert errors[1] < 2e-3 and errors[0] / errors[1] == pytest.approx(2, abs=0.1)


def test_the_steady_state_is_the_known_one():
    weight, bias = fit_linear(0.8, 0.25, noise=1.0)
    assert (weight, bias) == (-2.0, 1.6)
    still = steady_state(lambda x: weight * x + bias, 1.0, EDGES)
    torch.testing.assert_close(still @ CENTRE, torch.tensor(0.8, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(
        still @ CENTRE.square(), torch.tensor(0.25 + 0.64, dtype=torch.float64), rtol=0, atol=1e-9
    )
    # multiplicative noise: a = -x, K^2 = 2 (1 + x^2) has g ~ (1 + x^2)^(-3/2), Student's law with two degrees
    edges = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    x = (edges[1:] + edges[:-1]) / 2
    student = (1 + x.square()).pow(-1.5)
    found = steady_state(torch.neg, lambda z: (2 * (1 + z.square())).sqrt(), edges)
    torch.testing.assert_close(found, student / student.sum(), rtol=1e-4, atol=0)


def test_the_steady_state_stands_still_and_is_reached():
    def velocity(x):
        return torch.tanh(-2 * x + 0.5)

    still = steady_state(velocity, 1.0, EDGES)
    torch.testing.assert_close(fokker_planck(velocity, 1.0, EDGES, still, torch.tensor([3.0]))[0], still)
    late = fokker_planck(velocity, 1.0, EDGES, gaussian(-3.0, 0.1), torch.tensor([60.0]))[0]
    torch.testing.assert_close(late, still, rtol=0, atol=1e-8)


def test_finite_volumes_against_the_exact_law():
    """A Gaussian stays one under a linear velocity; the error in space falls with the square of the width."""
    times = torch.tensor([0.0, 0.3, 0.6, 0.9, 2.0])
    errors = []
    for cells in (100, 200):
        edges = torch.linspace(-6, 6, cells + 1, dtype=torch.float64)
        centre = (edges[1:] + edges[:-1]) / 2
        start = gaussian(-1.0, 0.3).reshape(cells, -1).sum(1)
        path = fokker_planck(lambda x: 0.5 - x, 0.8, edges, start, times)
        assert (path >= 0).all()
        torch.testing.assert_close(path.sum(1), torch.ones(5).double(), rtol=0, atol=1e-12)
        exact = linear_moments(times, weight=-1.0, bias=0.5, mean=-1.0, variance=0.3, noise=0.8)
        errors.append(float((path @ centre.square() - exact.second).abs().max()))
    assert errors[1] < 2e-3 and errors[0] / errors[1] == pytest.approx(4, abs=0.3)


def test_a_stochastic_network_follows():
    torch.manual_seed(0)
    x = 0.6 * torch.randn(20_000, dtype=torch.float64) - 1.5
    flow = stream(network(torch.tanh, -2.0, 0.5, 1.0, blocks=80), x)
    path = fokker_planck(lambda z: torch.tanh(0.5 - 2 * z), 1.0, EDGES, shares(x), torch.tensor(DEPTHS))
    for depth, share in zip(DEPTHS, path, strict=True):
        measured = shares(flow[round(depth / HORIZON * 80)])
        assert total_variation(measured, share) < 0.025  # sampling alone: 0.011
    wrong = fokker_planck(lambda z: torch.tanh(0.5 - 1.5 * z), 1.0, EDGES, shares(x), torch.tensor(DEPTHS))
    assert total_variation(shares(flow[-1]), wrong[-1]) > 0.04  # the test can tell


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": 0.0}, "noise must be positive.*linear_moments"),
        ({"noise": lambda x: x}, "noise must be positive"),
        ({"velocity": lambda x: x[:2]}, "velocity must be finite and act element"),
        ({"velocity": lambda x: x / 0}, "velocity must be finite"),
        ({"edges": torch.tensor([0.0, 1.0, 3.0])}, "even steps"),
        ({"edges": torch.zeros(4)}, "even steps"),
        ({"edges": torch.zeros(2)}, "two cells"),
        ({"share": torch.tensor([1.0, -1.0, 0.5, 0.5])}, "share"),
        ({"share": torch.ones(3)}, "share"),
        ({"times": torch.tensor([1.0, 0.5])}, "times"),
        ({"times": torch.tensor([])}, "times"),
        ({"max_bytes": 100}, "enough for 1 cells"),
    ],
)
def test_bad_arguments(change, message):
    good = {"velocity": torch.neg, "noise": 1.0, "edges": torch.linspace(-1, 1, 5), "share": torch.ones(4) / 4}
    call = good | {"times": torch.tensor([1.0])} | change
    with pytest.raises(ValueError, match=message):
        fokker_planck(**call)


def test_bad_moments():
    good = {"weight": 1.0, "bias": 0.0, "mean": 0.0, "variance": 1.0}
    for change in ({"variance": -1.0}, {"noise": -1.0}, {"weight": math.nan}):
        with pytest.raises(ValueError, match=next(iter(change))):
            linear_moments(torch.ones(1), **(good | change))
    with pytest.raises(ValueError, match="times"):
        linear_moments(-torch.ones(1), **good)
    with pytest.raises(ValueError, match="noise keeps the width"):
        fit_linear(0.0, 1.0, 0.0)
