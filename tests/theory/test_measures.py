"""Steps over measures, on convex problems whose minimiser is known."""

import math

import pytest
import torch

from recipes.theory.measures import (
    DECAY,
    GRID,
    KAPPA,
    MASSES,
    MEAN,
    SPIKES,
    TEMPERATURE,
    euler,
    mirror,
    potential,
    spikes,
)
from torch_meanfield.theory.measures import implicit_euler_step, kl_proximal_step, wfr_step


def test_the_mirror_step_solves_its_proximal_problem():
    generator = torch.Generator().manual_seed(0)
    weights, base = (torch.rand(5, generator=generator, dtype=torch.float64).softmax(0) for _ in range(2))
    v, step, temperature = torch.randn(5, generator=generator, dtype=torch.float64), 0.7, 0.3

    def objective(mu):
        kl = (mu * (mu / weights).log()).sum()
        return (mu * v).sum() + temperature * (mu * (mu / base).log()).sum() + kl / step

    found = kl_proximal_step(weights, v, step=step, temperature=temperature, base=base).requires_grad_()
    assert found.sum().item() == pytest.approx(1.0)
    (gradient,) = torch.autograd.grad(objective(found), found)
    torch.testing.assert_close(gradient, gradient.mean().expand(5))  # stationary on the simplex


def test_the_mirror_step_at_temperature_0_is_birth_and_death():
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    v = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    small = 1e-6
    rate = (kl_proximal_step(weights, v, step=small) - weights) / small
    torch.testing.assert_close(rate, -weights * (v - weights @ v), atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, TEMPERATURE])
def test_the_mirror_steps_keep_their_rate(temperature):
    step, steps = 1 / (9 * KAPPA), 200
    gaps, _, gibbs = mirror(step, steps, temperature)
    positive = gibbs[gibbs > 0]
    kl = float((positive * (positive * len(GRID)).log()).sum())
    for k in range(1, steps):
        growth = ((1 + step * temperature) ** k - 1) / temperature if temperature else step * k
        assert -1e-12 < gaps[k] <= min(gaps[k - 1], kl / growth)


def test_the_mirror_steps_find_the_gibbs_minimiser():
    _, weights, gibbs = mirror(1 / (9 * KAPPA), 3000, TEMPERATURE)
    # the grid's end is 4.5 standard deviations from the mean: what is cut off moves it by 1e-7
    torch.testing.assert_close(weights, gibbs, atol=1e-6, rtol=0)
    mean = weights @ GRID
    assert mean.item() == pytest.approx(MEAN, abs=1e-4)
    assert (weights @ (GRID - mean).square()).item() == pytest.approx(TEMPERATURE / DECAY, rel=1e-3)


def test_transport_and_reaction_in_turn_go_further_than_either_alone():
    both, transport, reaction = spikes(0.05, 5.0, 1000), spikes(0.05, 0.0, 1000), spikes(0.05, 5.0, 1000, move=False)
    assert all(later <= earlier + 1e-15 for earlier, later in zip(both, both[1:], strict=False))
    assert both[-1] < 1e-5 < 0.05 * min(transport[-1], reaction[-1])


def test_the_minimiser_of_the_spikes_is_a_fixed_point():
    positions, weights = wfr_step(SPIKES, MASSES, potential, step=0.1, alpha=1.0)
    torch.testing.assert_close(positions, SPIKES, atol=1e-14, rtol=0)
    torch.testing.assert_close(weights, MASSES)


def test_transport_alone_is_gradient_descent():
    positions = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None].requires_grad_()
    weights = torch.full((6,), 1 / 6, dtype=torch.float64)
    target = potential(positions, positions * 0, weights * 0)  # -int K dmu_*
    pairs = torch.exp(-(positions - positions.T).square() / (4 * 0.35**2))
    energy = weights @ pairs @ weights / 2 + weights @ target
    (gradient,) = torch.autograd.grad(energy, positions)
    moved, same = wfr_step(positions.detach(), weights, potential, step=0.3, alpha=0.0)
    torch.testing.assert_close(moved, positions.detach() - 0.3 * 6 * gradient)
    assert torch.equal(same, weights)


@pytest.mark.parametrize("step", [0.01, 1.0, 100.0])
def test_the_implicit_step_of_a_quadratic(step):
    positions = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = implicit_euler_step(lambda x: 3 * x.square().sum(1).mean() / 2, positions, step=step)
    torch.testing.assert_close(moved, positions / (1 + 3 * step))


def test_implicit_steps_descend_where_explicit_ones_do_not():
    explicit, implicit = euler(50.0, steps=3)
    assert implicit < 1e-3 < explicit


def test_bad_arguments():
    half = torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match="must be \\(n,\\)"):
        kl_proximal_step(half, torch.ones(3), step=1.0)
    with pytest.raises(ValueError, match="weights must be positive"):
        kl_proximal_step(torch.tensor([1.0, 0.0]), half, step=1.0)
    with pytest.raises(ValueError, match="step must be positive"):
        kl_proximal_step(half, half, step=0.0)
    with pytest.raises(ValueError, match="temperature"):
        kl_proximal_step(half, half, step=1.0, temperature=math.nan)
    with pytest.raises(ValueError, match="alpha"):
        wfr_step(SPIKES, MASSES, potential, step=0.1, alpha=-1.0)
    with pytest.raises(RuntimeError, match="not solved"):
        implicit_euler_step(lambda x: x.exp().mean(), torch.ones(3, 1), step=1e3, iterations=1)
