#!/usr/bin/env python3
"""Fluctuations of finite networks about the mean-field limit: 1/n, and Gaussian.

    python recipes/theory/fluctuations.py [--networks 200] [--out runs/theory/fluctuations]

f_n(x) = (1/n) sum_i c_i tanh(z_i x + b_i), standard normal at the start, learns sin(2x) on eight points by full-batch
gradient descent. The limit is trained too: 131,072 evenly spread particles. Left: n times the mean squared deviation
from the limit, over two decades of n, at the start and after training, beside the central limit theorem's prediction
(no fit). Middle: the same over time, with (32). Right: the deviation at n = 1,000 along its leading direction, in
units of the predicted standard deviation, against a standard normal. Two minutes on one core.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from recipes.theory.report import arguments, figure, save, table
from torch_meanfield.theory.fluctuations import (
    fluctuation_covariance,
    gaussian_particles,
    monte_carlo_variance,
    train_particles,
)

X = torch.linspace(-1.5, 1.5, 8, dtype=torch.float64)[:, None]
Y = torch.sin(2 * X[:, 0])
DT, STEPS = 0.25, 120
WIDTHS = (100, 316, 1_000, 3_162, 10_000)
CHUNK = 200_000  # particles trained at a time


def unit(x: Tensor, theta: Tensor) -> Tensor:
    """c tanh(z x + b); theta = (c, z, b)."""
    c, z, b = theta.unsqueeze(-3).unbind(-1)
    return c * torch.tanh(z * x + b)


def limit(particles: int, seed: int) -> tuple[Tensor, Tensor]:
    """The limit's outputs over time and its final particles."""
    return train_particles(unit, gaussian_particles(particles, 3, seed=seed), X, Y, dt=DT, steps=STEPS)


def trained(n: int, networks: int, seed: int) -> Tensor:
    """Outputs over time of many networks: ``(steps + 1, networks, N)``."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(networks, n, 3, generator=generator, dtype=torch.float64)
    parts = theta.split(max(1, CHUNK // n))
    return torch.cat([train_particles(unit, part, X, Y, dt=DT, steps=STEPS)[0] for part in parts], 1)


def normality(deviation: Tensor, covariance: Tensor) -> tuple[Tensor, float, float]:
    """Deviations along the covariance's leading direction over their predicted standard deviation, and two p-values.

    Kolmogorov and Smirnov against N(0, 1), nothing fitted; D'Agostino and Pearson for skewness and kurtosis.
    """
    from scipy import stats

    value, vector = torch.linalg.eigh(covariance)
    scores = deviation @ vector[:, -1] / value[-1].sqrt()
    return scores, float(stats.kstest(scores.numpy(), "norm").pvalue), float(stats.normaltest(scores.numpy()).pvalue)


def main() -> None:
    parser = arguments("fluctuations", __doc__)
    parser.add_argument("--networks", type=int, default=200)
    parser.add_argument("--particles", type=int, default=2**17, help="particles of the limit")
    args = parser.parse_args()
    begun = time.perf_counter()
    f, final = limit(args.particles, seed=0)
    other = limit(args.particles, seed=1)[0]
    start_particles = gaussian_particles(2**13, 3)
    predicted = {
        t: fluctuation_covariance(unit, start_particles, X, Y, dt=DT, steps=t)
        for t in (0, STEPS // 8, STEPS // 4, STEPS // 2, STEPS)
    }
    scaled, rows, at_1000 = {}, [], torch.empty(0)
    for n in WIDTHS:
        deviation = trained(n, args.networks, args.seed + n) - f[:, None]
        scaled[n] = n * deviation.square().mean((1, 2))
        if n == 1_000:
            at_1000 = deviation[-1] * n**0.5
        rows.append([n, float(scaled[n][0]), float(scaled[n][-1])])
    start, end = (float(predicted[t].diagonal().mean()) for t in (0, STEPS))
    rows.append(["predicted", start, end])
    scores, ks, pearson = normality(at_1000, predicted[STEPS])
    logs = torch.tensor(WIDTHS, dtype=torch.float64).log()
    values = torch.tensor([r[2] for r in rows[:-1]], dtype=torch.float64).log()
    slope = float(((logs - logs.mean()) * (values - values.mean())).sum() / (logs - logs.mean()).square().sum())
    bound = float(monte_carlo_variance(unit, final, X))

    picture, (left, middle, right) = figure(3)
    for column, (label, value) in enumerate((("start", start), ("trained", end))):
        left.loglog(WIDTHS, [r[column + 1] for r in rows[:-1]], "o", color=f"C{column}", label=label)
        left.axhline(value, color=f"C{column}")
    left.set(title="n x squared deviation (lines: predicted)", xlabel="n")
    times = DT * torch.arange(STEPS + 1)
    for n in WIDTHS:
        middle.semilogy(times, scaled[n], linewidth=0.8, label=f"n = {n:,}")
    middle.semilogy([DT * t for t in predicted], [float(c.diagonal().mean()) for c in predicted.values()], "ks",
                    label="predicted")  # fmt: skip
    middle.axhline(bound, color="grey", linestyle=":", label="right-hand side of (32)")
    middle.set(title="n x squared deviation", xlabel="time")
    grid = torch.linspace(-4, 4, 200)
    right.hist(scores.numpy(), bins=25, density=True, alpha=0.5, label=f"n = 1,000 ({args.networks} networks)")
    right.plot(grid, torch.exp(-grid.square() / 2) / 2.5066, color="k", label="N(0, 1)")
    right.set(title=f"deviation / predicted (p = {ks:.2f}, {pearson:.2f})")
    for axis in (left, middle, right):
        axis.legend(fontsize=7)
    losses = ((f - Y).square().mean(1) / 2).tolist()
    text = table(["n", "n x squared deviation, start", "trained"], rows)
    text += (
        f"\nSlope in n after training: {slope:.3f}. Right-hand side of (32): {bound:.3g}. Normality at n = 1,000: "
        f"p = {ks:.2f} (Kolmogorov-Smirnov against the predicted normal), {pearson:.2f} (skewness and kurtosis). "
        f"Loss of the limit {losses[0]:.3g} -> {losses[-1]:.3g}; after training its outputs differ by "
        f"{float((f - other)[-1].abs().max()):.1e} from those of other particles.\n"
    )
    results: dict[str, Any] = {"rows": rows, "slope": slope, "p": [ks, pearson], "bound": bound}
    save(args, "fluctuations", text, results, picture, begun)


if __name__ == "__main__":
    main()
