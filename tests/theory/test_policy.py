"""Policy gradient in the mean-field regime: exact values, Gibbs maximisers, rates, a trained network."""

import math

import pytest
import torch

from recipes.theory.policy import (
    GRID_TAU,
    KAPPA,
    REWARDS,
    TAU,
    Policy,
    across,
    fitted_rate,
    grid_world,
    mean_flow,
    policy_rate,
    stationary_mean,
    train,
    unit,
)
from torch_meanfield.theory.decisions import Decisions, soft_optimum, soft_worth
from torch_meanfield.theory.fluctuations import gaussian_particles
from torch_meanfield.theory.policy import first_variation, gibbs_law


def random_problem(states=6, actions=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    move = torch.rand(states, actions, states, generator=generator, dtype=torch.float64)
    reward = torch.randn(states, actions, generator=generator, dtype=torch.float64)
    start = torch.full((states,), 1 / states, dtype=torch.float64)
    return Decisions(reward, move / move.sum(-1, keepdim=True), 0.9, start), generator


def test_a_bandit_has_the_closed_form():
    bandit = Decisions.bandit(REWARDS)
    best = soft_optimum(bandit, TAU)
    torch.testing.assert_close(torch.softmax(best, -1)[0], torch.softmax(REWARDS / TAU, 0), rtol=1e-12, atol=0)
    worth = TAU * torch.log(torch.exp(REWARDS / TAU).mean())
    torch.testing.assert_close(soft_worth(bandit, best, TAU).total, worth, rtol=1e-12, atol=0)


def test_the_optimum_solves_bellmans_equation():
    """Plain value iteration as the reference."""
    problem, _ = random_problem()
    worth = soft_worth(problem, soft_optimum(problem, 0.2), 0.2)
    value = torch.zeros(6, dtype=torch.float64)
    for _ in range(500):
        q = problem.reward + 0.9 * problem.transition @ value
        value = 0.2 * (torch.logsumexp(q / 0.2, -1) - math.log(3))
    torch.testing.assert_close(worth.value, value, rtol=1e-10, atol=0)
    assert worth.advantage.abs().max() < 1e-10
    assert worth.visits.sum().item() == pytest.approx(10)


def test_worth_by_playing():
    """The value of a policy is the mean of what it collects."""
    problem, generator = random_problem(3, 2, seed=1)
    logits = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    policy = torch.softmax(logits, -1)
    gain = problem.reward - 0.3 * (policy * 2).log()
    state, total = torch.multinomial(problem.start, 20_000, replacement=True, generator=generator), 0.0
    for t in range(120):
        action = torch.multinomial(policy[state], 1, generator=generator)[:, 0]
        total = total + 0.9**t * gain[state, action]
        state = torch.multinomial(problem.transition[state, action], 1, generator=generator)[:, 0]
    error = float(total.std() / len(total) ** 0.5)
    assert soft_worth(problem, logits, 0.3).total.item() == pytest.approx(float(total.mean()), abs=4 * error)


def test_the_variation_is_the_gradient():
    problem, generator = random_problem()
    theta = torch.randn(5, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    features = torch.tanh(torch.randn(6, 3, 2, generator=generator, dtype=torch.float64) @ theta.T)
    worth = soft_worth(problem, features.mean(-1), 0.2).total
    (gradient,) = torch.autograd.grad(worth, theta, retain_graph=True)
    variation = first_variation(problem, features.mean(-1).detach(), features, 0.2)
    torch.testing.assert_close(torch.autograd.grad(variation.sum(), theta)[0], 5 * gradient, rtol=1e-10, atol=1e-12)


def test_ascent_reaches_the_gibbs_maximiser_at_the_rate():
    inputs = torch.eye(len(REWARDS), dtype=torch.float64)[None]
    bandit = Decisions.bandit(REWARDS)
    policy = Policy(gaussian_particles(8, len(REWARDS)), inputs, False)
    worth, _ = train(policy, bandit, TAU, 0.0, dt=1.0, steps=600, seed=0)
    assert (worth.diff() > -1e-12).all()  # it only climbs
    best = TAU * torch.log(torch.exp(REWARDS / TAU).mean())
    assert abs(float(worth[-1] - best)) < 1e-6
    times = torch.arange(601, dtype=torch.float64)
    assert fitted_rate(times[450:], (best - worth)[450:]) == pytest.approx(policy_rate(), rel=0.05)


def test_linear_units_have_a_gaussian_law():
    """The stationary law of theta . e_a is N(m, I / kappa), and m is where the equation of the mean rests."""
    bandit, points = Decisions.bandit(REWARDS), gaussian_particles(2**13, len(REWARDS)) / math.sqrt(KAPPA)
    law = gibbs_law(bandit, points.T[None], temperature=TAU, noise=1.0)
    rest, _, _ = stationary_mean(bandit, 1.0)
    torch.testing.assert_close(law.logits[0], rest, rtol=0, atol=5e-3)
    spread = law.weights @ (points - law.logits[0]).square()
    torch.testing.assert_close(spread, torch.ones_like(spread) / KAPPA, rtol=0.03, atol=0)


def test_more_noise_is_faster_and_the_network_follows_the_mean():
    bandit, inputs = Decisions.bandit(REWARDS), torch.eye(len(REWARDS), dtype=torch.float64)[None]
    rates = []
    for noise in (0.7, 1.4):
        rest, rate, slowest = stationary_mean(bandit, noise)
        theta = gaussian_particles(8192, len(REWARDS)) + rest + 0.5 * slowest
        dt = 0.03 / rate
        means = train(Policy(theta, inputs, False), bandit, TAU, noise, dt=dt, steps=50, seed=0)[1]
        predicted = across(mean_flow(bandit, means[0], noise, dt, 50) - rest)
        assert (across(means - rest) - predicted).abs().max() < 0.05 * predicted[0]
        assert fitted_rate(dt * torch.arange(51).double(), predicted) == pytest.approx(rate, rel=0.05)
        rates.append(rate)
    assert rates[1] > 2 * rates[0]


def test_a_trained_network_has_the_law_that_was_predicted():
    problem, inputs = grid_world(size=3)
    points = gaussian_particles(2**12, 5)
    law = gibbs_law(problem, unit(points, inputs), temperature=GRID_TAU, noise=2.0)
    policy = Policy(gaussian_particles(512, 5), inputs, True)
    worth, _ = train(policy, problem, GRID_TAU, 2.0, dt=0.02, steps=200, seed=0)
    assert float(worth[-100:].mean()) == pytest.approx(float(law.total), rel=0.03)
    assert float(law.total) > 1.2 * float(worth[0])
    again = torch.softmax(first_variation(problem, law.logits, unit(points, inputs), GRID_TAU) / 2, 0)
    torch.testing.assert_close(again, law.weights, rtol=1e-6, atol=1e-12)


def test_single_precision_is_taken():
    problem, generator = random_problem()
    single = Decisions(problem.reward.float(), problem.transition.float(), 0.9, problem.start.float())
    features = torch.randn(6, 3, 64, generator=generator)
    law = gibbs_law(single, features, temperature=0.2, noise=3.0)
    assert law.logits.dtype == torch.float64
    assert soft_worth(single, soft_optimum(single, 0.2), 0.2).total > law.total


def test_bad_arguments():
    problem, inputs = random_problem()[0], torch.zeros(6, 3, 4, dtype=torch.float64)
    logits = problem.reward
    with pytest.raises(ValueError, match="discount"):
        soft_worth(problem._replace(discount=1.0), logits, 0.1)
    with pytest.raises(ValueError, match="transition must hold probabilities"):
        soft_worth(problem._replace(transition=2 * problem.transition), logits, 0.1)
    with pytest.raises(ValueError, match="transition must be .* and start"):
        soft_worth(problem._replace(start=torch.ones(2) / 2), logits, 0.1)
    with pytest.raises(ValueError, match="reward must be"):
        Decisions.bandit(torch.ones(2, 2))
    with pytest.raises(ValueError, match="logits must be"):
        soft_worth(problem, logits[:2], 0.1)
    with pytest.raises(ValueError, match="temperature"):
        soft_worth(problem, logits, -0.1)
    with pytest.raises(ValueError, match="no Gibbs form"):
        soft_optimum(problem, 0.0)
    with pytest.raises(ValueError, match="features must be"):
        first_variation(problem, logits, inputs[:2], 0.1)
    with pytest.raises(ValueError, match="noise"):
        gibbs_law(problem, inputs, temperature=0.1, noise=0.0)
    with pytest.raises(ValueError, match="damping"):
        gibbs_law(problem, inputs, temperature=0.1, noise=1.0, damping=0.0)
    with pytest.raises(RuntimeError, match="try damping=0.25"):
        gibbs_law(
            problem, 50 * torch.randn(6, 3, 9).double(), temperature=0.1, noise=0.1, damping=1.0, max_iterations=3
        )
