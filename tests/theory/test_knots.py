"""Where wide ReLU networks of one input bend: closed forms, optimality, a trained network."""

import math
import sys

import pytest
import torch

pytest.importorskip("scipy")

from recipes.theory.knots import DATA, PENALTY, census, difference, objective, train, units_of
from torch_meanfield.theory.knots import knots_between, regularised_knots


def random_data(seed, count=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(-2, 2, count, dtype=torch.float64) + 0.3 * torch.rand(count, generator=generator).double()
    return x, torch.randn(count, generator=generator, dtype=torch.float64)


def test_one_datum_has_a_closed_form():
    """One direction, along (x, 1); the residual is penalty / |(x, 1)|."""
    found = regularised_knots(torch.tensor([1.0]), torch.tensor([2.0]), 0.1)
    assert found.residual.item() == pytest.approx(0.1 / math.sqrt(2), rel=1e-9)
    assert found.angle.item() == pytest.approx(math.pi / 4, rel=1e-9)
    assert found.mass.item() == pytest.approx((2 - 0.1 / math.sqrt(2)) / math.sqrt(2), rel=1e-9)


def test_nothing_is_learned_beyond_the_largest_penalty():
    x, y = random_data(0)
    assert len(regularised_knots(x, y, 100.0).mass) == 0


@pytest.mark.parametrize("seed", range(12))
def test_optimality(seed):
    """The potential stays within the penalty in every direction and reaches it, with the right sign, at the atoms."""
    x, y = random_data(seed)
    found = regularised_knots(x, y, 0.01)
    torch.testing.assert_close(y - found(x), found.residual, rtol=0, atol=1e-6)

    def potential(angle):
        return found.residual @ (x[:, None] * angle.cos() + angle.sin()).clamp(min=0) / len(x)

    everywhere = torch.linspace(0, 2 * math.pi, 100_001, dtype=torch.float64)
    assert potential(everywhere).abs().max() <= 0.01 * (1 + 1e-8)
    torch.testing.assert_close(potential(found.angle), 0.01 * found.mass.sign(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(12))
def test_knots_off_the_data_are_where_residuals_balance(seed):
    x, y = random_data(seed)
    found = regularised_knots(x, y, 0.01)
    for location, angle in zip(found.location, found.angle, strict=True):
        if not x[0] < location < x[-1] or (location - x).abs().min() < 1e-6:
            continue
        active = (x * angle.cos() + angle.sin()) > 0
        r = found.residual[active]
        assert (-r.sum() / (r @ x[active])).item() == pytest.approx(location.item(), abs=1e-4)


def test_no_gap_has_more_than_three_and_some_knots_are_off_the_data():
    every, off = census(60, seed=1)
    assert max(every) <= 3 and max(off) <= 2
    assert sum(off[c] for c in off if c) > 10


def test_a_trained_network_bends_there():
    x, y = DATA[0]
    found, theta = regularised_knots(x, y, PENALTY), train(x, y, units=300, steps=0.3)
    assert difference(found, theta, torch.linspace(-2, 2, 81, dtype=torch.float64)) < 0.02
    least = float(found.residual.square().mean() / 2 + PENALTY * found.mass.abs().sum())
    assert least < float(objective(theta, x, y)[1]) < 1.005 * least
    predicted = knots_between(found.location, found.bend, x, apart=1e-6)
    measured = knots_between(*units_of(theta), x, apart=0.03, share=0.01)
    off = [[k for gap in knots for k in gap if k[2] > 0.1] for knots in (predicted, measured)]
    assert len(off[0]) == len(off[1]) == 1
    torch.testing.assert_close(off[1][0], off[0][0], rtol=0, atol=0.02)


def test_counting():
    location = torch.tensor([0.5, 0.51, 0.9, 1.5, 5.0, 1.2])
    bend = torch.tensor([1.0, 2.0, 1.0, -2.0, 9.0, 1e-6])
    first, second = knots_between(location, bend, torch.tensor([2.0, 0.0, 1.0]), apart=0.02)
    assert len(first) == 2 and len(second) == 1
    torch.testing.assert_close(
        first[0], torch.tensor([0.5 + 0.02 / 3, 3.0, 0.5 - 0.02 / 3]).double(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2)}, "distinct"),
        ({"x": torch.ones(3)}, r"\(M,\)"),
        ({"y": torch.tensor([1.0, math.inf])}, "finite"),
        ({"penalty": 0.0}, "penalty"),
        ({"tolerance": -1.0}, "tolerance"),
    ],
)
def test_bad_arguments(change, message):
    good = {"x": torch.tensor([0.0, 1.0]), "y": torch.ones(2), "penalty": 0.1}
    with pytest.raises(ValueError, match=message):
        regularised_knots(**(good | change))


def test_bad_counts_and_a_missing_package(monkeypatch):
    one = torch.ones(1)
    with pytest.raises(ValueError, match="bend must be"):
        knots_between(one, torch.ones(2), one, apart=0.1)
    with pytest.raises(ValueError, match="apart"):
        knots_between(one, one, one, apart=-0.1)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"torch-meanfield\[theory\]"):
        regularised_knots(one, one, 0.1)
