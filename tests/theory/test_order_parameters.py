"""The equations of one-pass SGD against Gaussian averages, a simulation in d = 1,000, and known solutions."""

import math

import pytest
import torch

from recipes.theory.order_parameters import deviations
from torch_meanfield.theory.order_parameters import Overlaps, integrate_sgd, population_risk, sgd_velocity


def example(p=3, k=2, d=6):
    generator = torch.Generator().manual_seed(0)
    return Overlaps.of(torch.randn(p, d, generator=generator), torch.randn(k, d, generator=generator))


def test_closed_forms_against_sampled_gaussian_fields():
    overlaps, rate, noise, count = example(), 0.7, 0.3, 250_000
    generator = torch.Generator().manual_seed(1)
    factor = torch.linalg.cholesky(overlaps.covariance())
    normal = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    fields = torch.cat([normal, -normal]) @ factor.T
    values = torch.erf(fields / math.sqrt(2))
    clean = values[:, 3:].mean(1) - values[:, :3].mean(1)
    error = clean + math.sqrt(noise) * torch.randn(2 * count, generator=generator, dtype=torch.float64)
    slopes = math.sqrt(2 / math.pi) * torch.exp(-fields[:, :3].square() / 2)
    first = (slopes * error[:, None]).T @ fields / len(fields)
    square = (slopes * error.square()[:, None]).T @ slopes / len(fields)
    q, m = sgd_velocity(overlaps, rate=rate, noise=noise)
    torch.testing.assert_close(m, first[:, 3:], atol=2e-3, rtol=0)
    torch.testing.assert_close(q, first[:, :3] + first[:, :3].T + rate * square, atol=4e-3, rtol=0)
    assert population_risk(overlaps).item() == pytest.approx(clean.square().mean().item() / 2, rel=1e-2)


def test_without_a_learning_rate_it_is_the_gradient_flow_of_the_risk():
    """In time tau the flow of the weights is -p d grad R."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    w = student / 6**0.5
    overlaps = Overlaps(w @ w.T, w @ teacher.T / 6**0.5, teacher @ teacher.T / 6)
    (gradient,) = torch.autograd.grad(population_risk(overlaps), student)
    velocity = -3 * 6 * gradient
    q, m = sgd_velocity(Overlaps.of(student, teacher), rate=0.0)
    torch.testing.assert_close(m, velocity @ teacher.T / 6)
    torch.testing.assert_close(q, (velocity @ student.T + student @ velocity.T).detach() / 6)


def test_a_student_that_is_the_teacher_stays_and_noise_moves_it():
    teacher = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double())[0][:2] * 6**0.5
    still = Overlaps.of(teacher, teacher)
    assert population_risk(still).item() == pytest.approx(0.0, abs=1e-15)
    q, m = sgd_velocity(still, rate=1.0)
    assert max(q.abs().max(), m.abs().max()) < 1e-12
    q, _ = sgd_velocity(still, rate=1.0, noise=0.5)  # 0.5 E[slope^2] = 0.5 (2 / pi) / sqrt(2^2 - 1)
    torch.testing.assert_close(q.diagonal(), torch.full((2,), 0.5 * 2 / math.pi / math.sqrt(3)).double())


def test_a_simulation_in_1000_dimensions_within_3_percent():
    measured, predicted, worst = deviations(1000, 4, rate=0.5, duration=6.0, records=6, seed=0)
    assert worst < 0.03
    assert population_risk(measured[-1]) < 0.1 * population_risk(measured[0])
    assert (measured[-1].m - measured[0].m).abs().max() > 0.3  # and there was something to predict


def test_the_noise_floor_is_proportional_to_the_learning_rate_over_the_width():
    teacher = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).double())[0][:2] * 8**0.5
    floors = []
    for rate in (0.02, 0.04):
        path = integrate_sgd(Overlaps.of(teacher, teacher), rate=rate, duration=40.0, steps=120, noise=0.1)
        floors.append(population_risk(path)[-1].item())
    assert floors[1] / floors[0] == pytest.approx(2.0, rel=0.05)


def test_bad_arguments():
    overlaps = example()
    good = {"rate": 0.1, "duration": 1.0, "steps": 10}
    for name, value in (("rate", -1.0), ("duration", math.inf), ("steps", 0), ("noise", -0.1)):
        with pytest.raises(ValueError, match=name):
            integrate_sgd(overlaps, **(good | {name: value}))
    with pytest.raises(ValueError, match="belong to no weights"):
        integrate_sgd(Overlaps(-overlaps.q, overlaps.m, overlaps.t), **good)
    with pytest.raises(ValueError, match="student and teacher"):
        Overlaps.of(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="beyond"):
        integrate_sgd(overlaps, rate=50.0, duration=1e9, steps=400)
