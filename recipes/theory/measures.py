#!/usr/bin/env python3
"""Measures as optimisers: mirror steps, transport and reaction, Langevin dynamics, dual averaging; and their rates.

    python recipes/theory/measures.py [--out runs/theory/measures]

Left: three spikes blurred by a Gaussian are found again by 40 weighted particles. Transport alone (W2), reaction alone
(KL) and the two in turn (WFR) minimise the same convex energy, whose minimum is 0. Middle: the mirror step on a grid,
for a convex energy with the entropy whose Gibbs minimiser is known, beside its rates. Right: `MeanFieldLangevin` and
`ParticleDualAveraging`, 20,000 particles, on the same kind of problem: the gap of the free energy beside the exact
solution of the mean-field equation, and 1/t. The table has explicit beside implicit Euler steps. 10 s on one core.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from recipes.theory.report import arguments, figure, save, table
from torch_meanfield.theory.dual_averaging import ParticleDualAveraging
from torch_meanfield.theory.langevin import MeanFieldLangevin
from torch_meanfield.theory.measures import implicit_euler_step, kl_proximal_step, wfr_step

# -- three spikes ------------------------------------------------------------------------------------------------------

SPIKES = torch.tensor([[-1.2], [0.1], [1.3]], dtype=torch.float64)
MASSES = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
BLUR = 0.35


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of Gaussians of standard deviation ``BLUR``, up to a factor."""
    return torch.exp(-(a[:, None] - b[None]).square().sum(-1) / (4 * BLUR**2))


def potential(at: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    """V = int K dmu - int K dmu_*, the first variation of half the squared distance of the blurred measures."""
    return kernel(at, positions) @ weights - kernel(at, SPIKES) @ MASSES


def blurred_distance(positions: Tensor, weights: Tensor) -> float:
    """The energy: 0 for the spikes themselves."""
    cross = weights @ kernel(positions, SPIKES) @ MASSES
    own, target = weights @ kernel(positions, positions) @ weights, MASSES @ kernel(SPIKES, SPIKES) @ MASSES
    return float(own / 2 - cross + target / 2)


def spikes(step: float, alpha: float, steps: int = 2000, move: bool = True) -> list[float]:
    """Energies of 40 particles that start evenly on [-2, 2]."""
    positions = torch.linspace(-2, 2, 40, dtype=torch.float64)[:, None]
    weights = torch.full((40,), 1 / 40, dtype=torch.float64)
    energies = [blurred_distance(positions, weights)]
    for _ in range(steps):
        if move:
            positions, weights = wfr_step(positions, weights, potential, step=step, alpha=alpha)
        else:
            weights = kl_proximal_step(weights, potential(positions, positions, weights), step=alpha * step)
        energies.append(blurred_distance(positions, weights))
    return energies


# -- E = kappa/2 (mean - target)^2 + lambda/2 int theta^2 + T entropy: its Gibbs minimiser is normal ------------------

KAPPA, TARGET, DECAY, TEMPERATURE = 2.0, 1.5, 1.0, 0.2
MEAN = KAPPA * TARGET / (KAPPA + DECAY)  # of the minimiser, whose variance is T / lambda
GRID = torch.linspace(-3, 3, 241, dtype=torch.float64)


def mirror(step: float, steps: int, temperature: float) -> tuple[list[float], Tensor, Tensor]:
    """Gaps of the energy on a grid; the final weights and the Gibbs weights of the known minimiser."""

    def energy(w: Tensor) -> float:
        entropy = float((w * (w * len(w)).log()).sum()) if temperature else 0.0
        return float(KAPPA / 2 * (w @ GRID - TARGET) ** 2 + DECAY / 2 * w @ GRID.square() + temperature * entropy)

    if temperature:  # the grid ends 4.5 standard deviations from the mean
        gibbs = torch.softmax(-(GRID - MEAN).square() * DECAY / (2 * temperature), 0)
    else:
        gibbs = (GRID == GRID[(GRID - MEAN).abs().argmin()]).double()  # MEAN is a point of the grid
    weights = torch.full_like(GRID, 1 / len(GRID))
    lowest, gaps = energy(gibbs), []
    for _ in range(steps):
        gaps.append(energy(weights) - lowest)
        variation = KAPPA * (weights @ GRID - TARGET) * GRID + DECAY / 2 * GRID.square()
        weights = kl_proximal_step(weights, variation, step=step, temperature=temperature)
    return gaps, weights, gibbs


def free_energy_gap(mean: Tensor | float, variance: Tensor | float) -> Tensor:
    """Of a normal law, over that of the minimiser."""
    mean, variance = torch.as_tensor(mean, dtype=torch.float64), torch.as_tensor(variance, dtype=torch.float64)
    best = TEMPERATURE / DECAY

    def value(a: Tensor, v: Tensor) -> Tensor:
        return KAPPA / 2 * (a - TARGET) ** 2 + DECAY / 2 * (a**2 + v) - TEMPERATURE / 2 * v.log()

    return value(mean, variance) - value(
        torch.tensor(MEAN, dtype=torch.float64), torch.tensor(best, dtype=torch.float64)
    )


def exact_gap(times: Tensor, mean: float, variance: float) -> Tensor:
    """The mean-field Langevin equation from a normal law: it stays normal, its two moments relax exponentially."""
    best = TEMPERATURE / DECAY
    a = MEAN + (mean - MEAN) * torch.exp(-(KAPPA + DECAY) * times)
    v = best + (variance - best) * torch.exp(-2 * DECAY * times)
    return free_energy_gap(a, v)


def particles(
    method: str, n: int, steps: int, lr: float, seed: int = 0, inner_steps: int = 40
) -> tuple[list[float], Tensor]:
    """Gaps of the free energy, one before each step and one at the end, and the particles; they begin at N(-1, 1)."""
    theta = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1
    theta.requires_grad_()
    settings = {"lr": lr, "temperature": TEMPERATURE, "weight_decay": DECAY, "particles": n, "seed": seed}

    def closure() -> tuple[Tensor, Tensor]:
        outputs = theta.mean()[None]
        return KAPPA / 2 * (outputs - TARGET).square().sum(), outputs

    gaps = []
    optimizer = (
        MeanFieldLangevin([theta], **settings)
        if method == "langevin"
        else ParticleDualAveraging([theta], inner_steps=inner_steps, **settings)
    )
    for _ in range(steps):
        gaps.append(float(free_energy_gap(theta.detach().mean(), theta.detach().var())))
        if isinstance(optimizer, ParticleDualAveraging):
            optimizer.step(closure)
        else:
            optimizer.zero_grad()
            closure()[0].backward()
            optimizer.step()
    gaps.append(float(free_energy_gap(theta.detach().mean(), theta.detach().var())))
    return gaps, theta.detach()


def euler(step: float, steps: int = 30) -> tuple[float, float]:
    """The spikes' energy after explicit and after implicit steps of the positions of 40 particles of equal weights."""
    weights = torch.full((40,), 1 / 40, dtype=torch.float64)
    explicit = implicit = torch.linspace(-2, 2, 40, dtype=torch.float64)[:, None]

    def energy(positions: Tensor) -> Tensor:
        return weights @ kernel(positions, positions) @ weights / 2 - weights @ kernel(positions, SPIKES) @ MASSES

    for _ in range(steps):
        explicit = wfr_step(explicit, weights, potential, step=step, alpha=0.0)[0]
        implicit = implicit_euler_step(energy, implicit, step=step, tolerance=1e-6)
    return blurred_distance(explicit, weights), blurred_distance(implicit, weights)


def main() -> None:
    args = arguments("measures", __doc__).parse_args()
    begun = time.perf_counter()
    picture, (left, middle, right) = figure(3)
    curves = {
        "transport (W2)": spikes(0.05, 0.0),
        "reaction (KL)": spikes(0.05, 5.0, move=False),
        "both in turn (WFR)": spikes(0.05, 5.0),
    }
    for name, values in curves.items():
        left.loglog(range(1, len(values) + 1), [max(v, 1e-16) for v in values], label=name)
    left.set(title="three blurred spikes, 40 particles", xlabel="step", ylabel="energy")

    step, steps = 1 / (9 * KAPPA), 1000
    ks = torch.arange(1, steps)
    flat, cold, spike = mirror(step, steps, 0.0)
    warm, found, gibbs = mirror(step, steps, TEMPERATURE)
    middle.loglog(ks, [max(g, 1e-16) for g in flat[1:]], color="C0", label="T = 0")
    middle.loglog(ks, math.log(len(GRID)) / (step * ks), ":", color="C0", label=r"KL$(\mu_*|\mu_0)/(sk)$")
    middle.loglog(ks, [max(g, 1e-16) for g in warm[1:]], color="C1", label=f"T = {TEMPERATURE}")
    kl = float((gibbs.clamp_min(1e-300) * (gibbs.clamp_min(1e-300) * len(GRID)).log()).sum())
    bound = TEMPERATURE * kl / ((1 + step * TEMPERATURE) ** ks.double() - 1)
    middle.loglog(ks, bound, ":", color="C1", label=r"$T\,$KL$/((1+sT)^k - 1)$")
    middle.set(title="mirror steps: gap of the energy", xlabel="step", ylim=(1e-9, None))

    n, lr = 20_000, 0.02
    langevin, theta = particles("langevin", n, 300, lr, args.seed)
    dual, dual_theta = particles("dual averaging", n, 100, lr, args.seed)
    times = lr * torch.arange(len(langevin))
    right.loglog(times[1:], langevin[1:], label="MeanFieldLangevin, time")
    right.loglog(times[1:], exact_gap(times, -1.0, 1.0)[1:], "k:", label="mean-field equation")
    right.loglog(range(1, len(dual)), dual[1:], "o-", markersize=3, label="ParticleDualAveraging, outer steps")
    right.loglog(range(1, len(dual)), [dual[1] / t for t in range(1, len(dual))], "--", color="grey", label="1/t")
    right.set(title=f"free-energy gap, {n:,} particles", xlabel="time, or outer steps", ylim=(1e-7, None))
    for axis in (left, middle, right):
        axis.legend(fontsize=7)
    rows = [[name, values[0], values[-1]] for name, values in curves.items()]
    text = "Three spikes, energy.\n\n" + table(["method", "start", "after 2,000 steps"], rows)
    gibbs_rows = [
        ["minimiser, in closed form", MEAN, TEMPERATURE / DECAY],
        ["mirror steps on the grid", float(found @ GRID), float(found @ (GRID - found @ GRID).square())],
        ["MeanFieldLangevin", float(theta.mean()), float(theta.var())],
        ["ParticleDualAveraging", float(dual_theta.mean()), float(dual_theta.var())],
    ]
    text += "\nThe Gibbs minimiser.\n\n" + table(["", "mean", "variance"], gibbs_rows)
    euler_rows = [[s, *euler(s)] for s in (0.05, 0.5, 5.0, 50.0)]
    text += "\nThree spikes, equal weights, energy after 30 Euler steps.\n\n"
    text += table(["step", "explicit", "implicit"], euler_rows)
    results = {
        "spikes": {k: v[::20] for k, v in curves.items()},
        "mirror": {"T = 0": flat[::10], "T > 0": warm[::10]},
        "euler": euler_rows,
        "langevin": langevin,
        "dual averaging": dual,
        "gibbs": gibbs_rows,
    }
    save(args, "measures", text, results, picture, begun)


if __name__ == "__main__":
    main()
