"""Isotropic Gaussians: averages over the sphere, the transition in delta, SGD beside its equation, the Gibbs law."""

import math

import pytest
import torch

from recipes.theory.landscape import samples, train
from torch_meanfield.theory.langevin import MeanFieldLangevin
from torch_meanfield.theory.radial import RadialProblem
from torch_meanfield.theory.radial_flow import radial_flow, radial_fokker_planck

Z = torch.tensor([0.3, 0.7, 1.0, 2.0, 5.0, 20.0, 100.0], dtype=torch.float64)


def test_averages_over_the_sphere():
    for dim in (2, 3, 40, 300):
        problem = RadialProblem(dim, 0.8)
        angle = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000 * math.pi
        weight = torch.sin(angle).pow(dim - 2)
        reference = (problem.unit(Z[:, None] * torch.cos(angle)) * weight).sum(1) / weight.sum()
        torch.testing.assert_close(problem.average(Z), reference, rtol=0, atol=1e-6)
        z = Z.clone().requires_grad_()
        (slope,) = torch.autograd.grad(problem.average(z).sum(), z)
        torch.testing.assert_close(problem.slope(Z), slope, rtol=0, atol=1e-8)


def test_many_dimensions_are_the_limit():
    near, limit = RadialProblem(4_000, 0.5), RadialProblem(None, 0.5)
    difference = near.average(Z * 4_000**0.5) - limit.average(Z)
    assert float(difference.abs().max()) < 2e-3


def test_the_quadrature_of_the_data():
    for dim in (2, 40):
        s, w, y = RadialProblem(dim, 0.3).inputs()
        assert float(w @ s.square()) == pytest.approx(dim * (1.3**2 + 0.7**2) / 2, rel=1e-8)
        assert float(w @ (y * s.pow(4))) == pytest.approx(dim * (dim + 2) * (1.3**4 - 0.7**4) / 2, rel=1e-8)
        radii = RadialProblem(dim, 0.3).gaussian_radii(1_000, 0.8)
        assert float(radii.square().mean()) == pytest.approx(0.64, rel=1e-3)


def test_one_radius_is_the_best_law_up_to_a_delta_where_its_risk_is_zero():
    """d to infinity: no other radius has a lower potential, up to delta = 0.47, where one radius fits both classes."""
    r = torch.linspace(0.01, 40, 80_001, dtype=torch.float64)
    best, risks = {}, {}
    for delta in (0.3, 0.46, 0.468, 0.478, 0.5):
        problem = RadialProblem(None, delta)
        s, w, y = problem.inputs()
        q = problem.average(r * s[:, None])
        k = int((w @ (q - y[:, None]).square()).argmin())
        potential = (w * (q[:, k] - y)) @ q
        best[delta] = float(potential.min() - potential[k])
        risks[delta] = float((w @ (q - y[:, None]).square())[k])
    assert [value > -1e-5 for value in best.values()] == [True, True, True, False, False]
    assert risks[0.468] < 2e-4 and risks[0.478] < 2e-4 and risks[0.46] > 5e-4 and risks[0.5] > 3e-3


def test_the_equation_is_that_of_the_particles():
    """One radius for each of many directions, evenly spread: the gradient of the risk is -2 psi'(r) along each."""
    problem = RadialProblem(8, 0.5)
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(40, 8, 8, generator=generator, dtype=torch.float64))[0].reshape(-1, 8)
    w = (1.1 * torch.cat([directions, -directions])).requires_grad_()
    x, y = (t.double() for t in samples(problem, 10_000, generator))
    loss = (problem.unit(x @ w.T).mean(1) - y).square().mean()
    (gradient,) = torch.autograd.grad(loss, w)
    radial = float((gradient * w.detach()).sum(1).mean() / 1.1) * len(w)
    start = torch.tensor([1.1], dtype=torch.float64)
    flow = radial_flow(problem, start, duration=1e-6, steps=1)
    assert float(flow.risk[0]) == pytest.approx(float(loss.detach()), rel=0.02)
    assert float(flow.radii - start) / 1e-6 == pytest.approx(-radial, rel=0.05)


def test_the_flow_descends_and_converges_with_its_step():
    problem = RadialProblem(40, 0.8)
    start = problem.gaussian_radii(20, 0.8)
    coarse, fine = (radial_flow(problem, start, duration=2.0, steps=n) for n in (80, 160))
    assert bool((coarse.risk.diff() < 0).all())
    assert float(coarse.risk[-1]) == pytest.approx(float(fine.risk[-1]), rel=1e-3)


def test_sgd_follows():
    problem = RadialProblem(20, 0.4)
    risks, radii = train(problem, 400, 0, duration=1.2)
    flow = radial_flow(problem, problem.gaussian_radii(50, 0.8), duration=1.2, steps=120)
    assert float((risks - flow.risk[::10]).abs().max() / flow.risk[0]) < 0.03
    assert float(radii[-1].mean()) == pytest.approx(float(flow.radii.mean()), rel=0.03)


def cells(problem, count, largest):
    return torch.histc(problem.gaussian_radii(4_000, 0.8), count, 0, largest) / 4_000


def test_noise_ends_in_the_gibbs_law_and_the_free_energy_falls():
    problem, temperature, decay, count, largest = RadialProblem(10, 0.5), 0.05, 0.1, 120, 7.0
    options = {"largest": largest, "temperature": temperature, "decay": decay}
    law = cells(problem, count, largest)
    flow = radial_fokker_planck(problem, law, duration=100.0, steps=500, **options)
    assert bool((flow.energy.diff() < 1e-12).all()) and float(flow.energy[0] - flow.energy[-1]) > 0.1
    assert float(flow.weights.sum()) == pytest.approx(1, abs=1e-12) and bool((flow.weights >= 0).all())
    s, w, y = problem.inputs()
    q = problem.average(flow.radii * s[:, None])
    potential = (w * (q @ flow.weights - y)) @ q + decay * flow.radii.square() / 2
    gibbs = flow.radii.pow(9) * torch.exp(-potential / temperature)
    torch.testing.assert_close(flow.weights, gibbs / gibbs.sum(), rtol=1e-5, atol=1e-12)
    # any other law of the same mass has more free energy
    mixed = (1 - 1e-3) * flow.weights + 1e-3 * law
    other = radial_fokker_planck(problem, mixed, duration=0.0, steps=1, **options)
    assert float(other.energy[0]) > float(flow.energy[-1])


def test_without_a_potential_it_is_ornstein_and_uhlenbeck():
    """A unit that is 0: the mean square of w falls from its start to d T / lambda like exp(-4 lambda t)."""
    problem = RadialProblem(6, 0.5, low=0.0, high=0.0)
    law = cells(problem, 200, 6.0)
    options = {"largest": 6.0, "temperature": 0.1, "decay": 0.4}
    start, end = (radial_fokker_planck(problem, law, duration=t, steps=200, **options) for t in (0.0, 0.5))
    before, after = (float(f.weights @ f.radii.square()) for f in (start, end))
    rest = 6 * 0.1 / 0.4
    assert after == pytest.approx(rest + (before - rest) * math.exp(-4 * 0.4 * 0.5), rel=2e-3)
    w = torch.nn.Parameter(torch.full((10_000, 6), (before / 6) ** 0.5, dtype=torch.float64))
    optimizer = MeanFieldLangevin([w], lr=2 * 0.005, temperature=0.1, weight_decay=0.4, particles=1)
    for _ in range(100):  # the same scaling in the optimizer: a time of 0.5 in steps of 0.005
        w.grad = torch.zeros_like(w)
        optimizer.step()
    assert float(w.detach().square().sum(1).mean()) == pytest.approx(after, rel=0.02)


GOOD = {"largest": 5.0, "temperature": 0.1, "decay": 0.1, "duration": 1.0, "steps": 2}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RadialProblem(1, 0.5), "dim must be an integer of at least 2"),
        (lambda: RadialProblem(5, 1.0), "delta must be in"),
        (lambda: RadialProblem(5, 0.5, start=2.0, end=1.0), "start < end"),
        (lambda: RadialProblem(5, 0.5).gaussian_radii(0, 0.8), "count must be a positive"),
        (lambda: RadialProblem(5, 0.5).gaussian_radii(3, -1.0), "scale must be positive"),
        (lambda: radial_flow(RadialProblem(5, 0.5), torch.ones(3), duration=-1.0, steps=2), "duration"),
        (lambda: radial_flow(RadialProblem(5, 0.5), torch.ones(3), duration=1.0, steps=0), "steps"),
        (lambda: radial_flow(RadialProblem(5, 0.5), -torch.ones(3), duration=1.0, steps=1), "radii must be above 0"),
        (lambda: radial_flow(RadialProblem(5, 0.5), torch.ones(3, 2), duration=1.0, steps=1), r"shape \(3, 2\)"),
        (lambda: radial_fokker_planck(RadialProblem(None, 0.5), torch.ones(3) / 3, **GOOD), "dim must be finite"),
        (lambda: radial_fokker_planck(RadialProblem(5, 0.5), torch.ones(3), **GOOD), "sum is 3"),
        (
            lambda: radial_fokker_planck(RadialProblem(5, 0.5), torch.ones(2) / 2, **GOOD | {"temperature": 0.0}),
            "above 0",
        ),
        (
            lambda: radial_fokker_planck(RadialProblem(5, 0.5), torch.ones(2) / 2, **GOOD | {"decay": -1.0}),
            "at least 0",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
