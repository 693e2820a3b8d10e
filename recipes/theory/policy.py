#!/usr/bin/env python3
"""Policy gradient of mean-field networks beside its Gibbs laws: a bandit and a grid world.

    python recipes/theory/policy.py [--particles 2000] [--out runs/theory/policy]

Left: a bandit of five arms, units theta . e_a, gradient ascent without noise: the gap to the Gibbs maximiser's worth,
tau log mean e^(r / tau), with the predicted rate. Middle: the same with noise: the distance of the particles' mean from
the stationary one, at three noises; solid: the equation of the mean; dashed: the predicted exponential rate, which
grows with the noise. Right: a grid world of 4 x 4 with slips, tanh units in five dimensions: the worth while the
network is trained, beside the worth of the stationary law (dashed), found without training. Half a minute on one core.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn

from recipes.theory.report import arguments, figure, save, table
from torch_meanfield.theory.decisions import Decisions, soft_optimum, soft_worth
from torch_meanfield.theory.fluctuations import gaussian_particles
from torch_meanfield.theory.langevin import MeanFieldLangevin
from torch_meanfield.theory.policy import gibbs_law

REWARDS = torch.tensor([1.0, 0.7, 0.2, 0.0, -0.5], dtype=torch.float64)
TAU, KAPPA = 0.5, 1.0
NOISES = (0.7, 1.0, 1.4)
PUSH = 1.0  # how far the particles begin from their stationary mean, in the slowest direction
GRID_TAU, GRID_NOISES, AMPLITUDE = 0.05, (0.7, 1.0, 2.0), 4.0
MOVES = ((0, 1), (1, 0), (0, -1), (-1, 0))


def grid_world(size: int = 4, slip: float = 0.1, discount: float = 0.9) -> tuple[Decisions, Tensor]:
    """A room with the goal in a corner, reward 1 in every step there; and the inputs of the units, ``(S, A, 5)``."""
    states = [(i, j) for i in range(size) for j in range(size)]
    transition = torch.zeros(len(states), 4, len(states), dtype=torch.float64)
    inputs = torch.zeros(len(states), 4, 5, dtype=torch.float64)
    for s, (i, j) in enumerate(states):
        for a, (di, dj) in enumerate(MOVES):
            inputs[s, a] = torch.tensor([di, dj, di * (i / (size - 1) - 0.5), dj * (j / (size - 1) - 0.5), 0.5])
            for b, (ei, ej) in enumerate(MOVES):
                to = min(max(i + ei, 0), size - 1), min(max(j + ej, 0), size - 1)
                transition[s, a, states.index(to)] += (1 - slip) * (a == b) + slip / 4
    goal = states.index((size - 1, size - 1))
    transition[goal] = 0
    transition[goal, :, goal] = 1
    reward = torch.zeros(len(states), 4, dtype=torch.float64)
    reward[goal] = 1
    start = torch.full((len(states),), 1 / len(states), dtype=torch.float64)
    return Decisions(reward, transition, discount, start), inputs


def unit(theta: Tensor, inputs: Tensor) -> Tensor:
    """f(theta, s, a), ``(S, A, n)``."""
    return AMPLITUDE * torch.tanh(inputs @ theta.T)


class Policy(nn.Module):
    """Logits: the mean of the units; linear ones if ``tanh`` is False."""

    def __init__(self, theta: Tensor, inputs: Tensor, tanh: bool) -> None:
        super().__init__()
        self.theta, self.inputs, self.tanh = nn.Parameter(theta.clone()), inputs, tanh

    def forward(self) -> Tensor:
        units = unit(self.theta, self.inputs) if self.tanh else self.inputs @ self.theta.T
        return units.mean(-1)


def train(
    policy: Policy, decisions: Decisions, tau: float, noise: float, *, dt: float, steps: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Noisy gradient ascent; the worth and the particles' mean at each step."""
    optimizer = MeanFieldLangevin(
        policy.parameters(),
        lr=dt,
        temperature=noise**2 / 2,
        weight_decay=KAPPA * noise**2 / 2,
        particles=len(policy.theta),
        seed=seed,
    )
    worths, means = [], []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        worth = soft_worth(decisions, policy(), tau).total
        worths.append(worth.detach())
        means.append(policy.theta.detach().mean(0))
        (-worth).backward()
        optimizer.step()
    return torch.stack(worths), torch.stack(means)


def mean_flow(decisions: Decisions, start: Tensor, noise: float, dt: float, steps: int) -> Tensor:
    """For linear units the mean has an equation of its own: m' = grad J(m) - sigma^2 kappa m / 2."""
    m, found = start.clone(), []
    for _ in range(steps + 1):
        found.append(m)
        at = m.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(soft_worth(decisions, at[None], TAU).total, at)
        m = m + dt * (gradient - noise**2 * KAPPA / 2 * m)
    return torch.stack(found)


def stationary_mean(decisions: Decisions, noise: float) -> tuple[Tensor, float, Tensor]:
    """Where that equation comes to rest, by Newton's steps; its slowest rate there, and in which direction.

    But for the shift of all logits, which no policy shows.
    """
    m, pull = torch.zeros(decisions.reward.shape[1], dtype=torch.float64), noise**2 * KAPPA / 2

    def worth(z: Tensor) -> Tensor:
        return soft_worth(decisions, z[None], TAU).total - pull / 2 * z.square().sum()

    for _ in range(20):
        hessian: Any = torch.autograd.functional.hessian(worth, m)
        m = m - torch.linalg.solve(hessian, torch.autograd.functional.jacobian(worth, m))
    seen = torch.linalg.svd(torch.ones(1, len(m), dtype=m.dtype))[2][1:]  # the directions across the shift
    rates, directions = torch.linalg.eigh(-seen @ hessian @ seen.T)
    return m, float(rates[0]), directions[:, 0] @ seen


def policy_rate() -> float:
    """The rate of the bandit's worth without noise: twice the least curvature, tau (diag(pi) - pi pi'), at the best."""
    pi = torch.softmax(REWARDS / TAU, 0)
    return 2 * TAU * float(torch.linalg.eigvalsh(torch.diag(pi) - torch.outer(pi, pi))[1])


def fitted_rate(times: Tensor, gap: Tensor) -> float:
    """Minus the slope of log(gap) over the times given."""
    t, y = times - times.mean(), gap.log()
    return -float((t * (y - y.mean())).sum() / t.square().sum())


def across(m: Tensor) -> Tensor:
    """The length of what policies see of logits."""
    return (m - m.mean(-1, keepdim=True)).norm(dim=-1)


def bandit(axes: Any, particles: int, seed: int) -> list[list[Any]]:
    """Both panels of the bandit; rows for the table."""
    problem = Decisions.bandit(REWARDS)
    inputs = torch.eye(len(REWARDS), dtype=torch.float64)[None]
    best, dt, steps = float(TAU * torch.log(torch.exp(REWARDS / TAU).mean())), 0.5, 1200
    start = gaussian_particles(64, len(REWARDS))
    gap = best - train(Policy(start, inputs, False), problem, TAU, 0.0, dt=dt, steps=steps, seed=seed)[0]
    times, late = dt * torch.arange(steps + 1, dtype=torch.float64), slice(900, 1200)
    rows: list[list[Any]] = [
        ["bandit, no noise: worth at the end", best, best - float(gap[-1])],
        ["bandit, no noise: gap at the end", 0.0, float(gap[-1])],
        ["bandit, no noise: rate of the gap", policy_rate(), fitted_rate(times[late], gap[late])],
    ]
    axes[0].semilogy(times, gap, ".", markersize=2, label="network")
    axes[0].semilogy(times, gap[late.start] * torch.exp(policy_rate() * (times[late.start] - times)), "k--",
                     label="predicted rate")  # fmt: skip
    axes[0].set(title="bandit: gap to the Gibbs maximiser", xlabel="time")
    for i, noise in enumerate(NOISES):
        rest, rate, slowest = stationary_mean(problem, noise)
        dt, steps = 0.02 / rate, 200
        times = dt * torch.arange(steps + 1, dtype=torch.float64)
        theta = gaussian_particles(8 * particles, len(REWARDS)) + rest + PUSH * slowest
        means = train(Policy(theta, inputs, False), problem, TAU, noise, dt=dt, steps=steps, seed=seed)[1]
        measured, predicted = (across(m - rest) for m in (means, mean_flow(problem, means[0], noise, dt, steps)))
        late = slice(25, 125)  # after half a time constant, and for two
        rows.append([f"bandit, noise {noise}: rate of the mean", rate, fitted_rate(times[late], measured[late])])
        worst = float((measured - predicted).abs().max() / predicted[0])
        rows.append([f"bandit, noise {noise}: largest gap of the means over the first distance", 0.0, worst])
        axes[1].semilogy(times[::8], measured[::8], ".", color=f"C{i}", label=f"noise {noise}")
        axes[1].semilogy(times, predicted, color=f"C{i}")
        axes[1].semilogy(
            times, predicted[25] * torch.exp(rate * (times[25] - times)), "--", color=f"C{i}", linewidth=0.7
        )
    axes[1].set(title="bandit: distance from the stationary mean", xlabel="time", ylim=(1e-2, 2))
    return rows


def room(axis: Any, particles: int, seed: int) -> list[list[Any]]:
    """The panel of the grid world; rows for the table."""
    problem, inputs = grid_world()
    points = gaussian_particles(2**13, inputs.shape[-1]) / math.sqrt(KAPPA)
    best = float(soft_worth(problem, soft_optimum(problem, GRID_TAU), GRID_TAU).total)
    axis.axhline(best, color="k", linestyle=":", label="best policy")
    rows: list[list[Any]] = [["grid world: worth of the best policy, no network's", best, "-"]]
    steps = 400
    for i, noise in enumerate(GRID_NOISES):
        dt = 0.05 / max(1.0, noise**2)  # a step widens the law by dt sigma^2 kappa / 4
        law = gibbs_law(problem, unit(points, inputs), temperature=GRID_TAU, noise=noise, damping=0.05)
        policy = Policy(gaussian_particles(particles, inputs.shape[-1]), inputs, True)
        worth, _ = train(policy, problem, GRID_TAU, noise, dt=dt, steps=steps, seed=seed)
        rows.append([f"grid world, noise {noise}: worth", float(law.total), float(worth[-100:].mean())])
        second = policy.theta.detach().square().mean(0).sum()
        rows.append(
            [f"grid world, noise {noise}: E|theta|^2", float(law.weights @ points.square().sum(1)), float(second)]
        )
        axis.plot(dt * torch.arange(steps + 1), worth, color=f"C{i}", label=f"noise {noise}")
        axis.axhline(float(law.total), color=f"C{i}", linestyle="--")
    axis.set(title="grid world: worth of the policy", xlabel="time")
    return rows


def main() -> None:
    parser = arguments("policy", __doc__)
    parser.add_argument("--particles", type=int, default=2048, help="a power of 2")
    args = parser.parse_args()
    begun = time.perf_counter()
    made, axes = figure(3)
    rows = [*bandit(axes, args.particles, args.seed), *room(axes[2], args.particles, args.seed)]
    for axis in axes:
        axis.legend(fontsize=7)
    results = {"particles": args.particles, "rows": rows}
    save(args, "policy", table(["what", "predicted", "measured"], rows), results, made, begun)


if __name__ == "__main__":
    main()
