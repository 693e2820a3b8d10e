#!/usr/bin/env python3
"""The generalisation gap by replica theory, beside ridge regression on frozen features.

    python recipes/theory/replica.py [--dim 500] [--draws 16] [--out runs/theory/replica]

Left: double descent: tanh random features of inputs of dimension 500, 750 noisy samples of a linear teacher, test error
over the number of features for three ridges. Middle: the same with 250 features over the number of samples: test and
training error. Right: the last hidden layer of a trained network, its moments measured on 20,000 samples, the
read-out fitted anew on n others; the gap, and its law 2 p / n for many samples (dotted). Lines: predicted; dots:
measured, mean and standard error of the draws of the data. A minute on one core.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn

from recipes.theory.report import arguments, figure, save, table
from torch_meanfield.theory.replica import FeatureMoments, random_feature_moments, ridge_generalisation

NOISE, SAMPLES, FRESH = 0.2, 750, 2000
WIDTHS = (100, 250, 400, 550, 650, 850, 1000, 1250, 1600)
RIDGES = (1e-2, 1.0, 30.0)
COUNTS = (60, 120, 180, 220, 300, 400, 600, 1000)
Record = Callable[[str, Tensor, Tensor, float], None]
Draw = Callable[[int], tuple[Tensor, Tensor]]


def frozen(d: int, p: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of length sqrt(d) for the features, and a teacher of that length."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(d, generator=generator, dtype=torch.float64)
    # the fewer are the first of the more, so that a curve over p is of one draw
    rows = torch.randn(max(p, WIDTHS[-1]), d, generator=generator, dtype=torch.float64)[:p]
    return rows / rows.norm(dim=1, keepdim=True) * math.sqrt(d), teacher / teacher.norm() * math.sqrt(d)


def random_features(weights: Tensor, teacher: Tensor, generator: torch.Generator) -> Draw:
    """Draws features and labels."""
    d = len(teacher)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
        noise = math.sqrt(NOISE) * torch.randn(count, generator=generator, dtype=torch.float64)
        return torch.tanh(x @ weights.T), x @ teacher + noise

    return draw


def ridge_errors(draw: Draw, n: int, ridges: Sequence[float], fresh: int = FRESH) -> Tensor:
    """Test and training error of fits on one draw of n samples, ``(2, ridges)``."""
    v, y = draw(n)
    other, wanted = draw(fresh)
    few = n < v.shape[1]
    gram, cross = (v @ v.T, other @ v.T) if few else (v.T @ v, other)
    found = []
    for ridge in ridges:
        system = gram + ridge * torch.eye(len(gram), dtype=v.dtype)
        w = torch.linalg.solve(system, y if few else v.T @ y)
        fit = gram @ w if few else v @ w
        found.append(torch.stack([(wanted - cross @ w).square().mean(), (y - fit).square().mean()]))
    return torch.stack(found, 1)


def trained_features(seed: int, d: int = 50, width: int = 128) -> tuple[Draw, FeatureMoments]:
    """The last hidden layer of a network after a short training, and its moments on 20,000 samples."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(3, d, generator=generator, dtype=torch.float64) / math.sqrt(d)

    def data(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, d, generator=generator, dtype=torch.float64)
        noise = math.sqrt(NOISE) * torch.randn(count, generator=generator, dtype=torch.float64)
        return x, torch.tanh(x @ directions.T).sum(1) + noise

    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(d, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()).double()
    head = nn.Linear(width, 1, dtype=torch.float64)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-3)
    for _ in range(150):
        x, y = data(256)
        optimizer.zero_grad()
        (head(body(x))[:, 0] - y).square().mean().backward()
        optimizer.step()

    @torch.no_grad()
    def draw(count: int) -> tuple[Tensor, Tensor]:
        x, y = data(count)
        return body(x), y

    v, y = draw(20_000)
    return draw, FeatureMoments(v.T @ v / len(v), v.T @ y / len(v), y.square().mean())


def compare(draw: Draw, n: int, ridges: Sequence[float], draws: int) -> tuple[Tensor, Tensor]:
    """Mean and standard error over draws of the data, ``(2, ridges)`` each."""
    runs = torch.stack([ridge_errors(draw, n, ridges) for _ in range(draws)])
    return runs.mean(0), runs.std(0) / math.sqrt(draws)


def panel(axis: Any, draw: Draw, moments: FeatureMoments, name: str, draws: int, record: Record) -> None:
    """Test error, training error and gap over the number of samples, at ridge 1."""
    fine = torch.logspace(math.log10(COUNTS[0]), math.log10(COUNTS[-1]), 60)
    curve, at = (ridge_generalisation(moments, n, 1.0) for n in (fine, torch.tensor(COUNTS)))
    for j, n in enumerate(COUNTS):
        mean, error = compare(draw, n, [1.0], draws)
        for k, (what, value) in enumerate((("test", at.test[j]), ("training", at.train[j]))):
            record(f"{name}, {n} samples: {what} error", mean[k, 0], error[k, 0], float(value))
            axis.errorbar(n, mean[k, 0], error[k, 0], fmt=".", color=f"C{k}")
        axis.plot(n, mean[0, 0] - mean[1, 0], ".", color="C2")
    for k, (what, line) in enumerate((("test", curve.test), ("training", curve.train), ("gap", curve.gap))):
        axis.loglog(fine, line, color=f"C{k}", label=what)
    axis.set(title=name, xlabel="samples n")


def main() -> None:
    parser = arguments("replica", __doc__)
    parser.add_argument("--dim", type=int, default=500)
    parser.add_argument("--draws", type=int, default=16)
    args = parser.parse_args()
    begun = time.perf_counter()
    made, (left, middle, right) = figure(3)
    rows: list[list[Any]] = []
    generator = torch.Generator().manual_seed(args.seed)

    def record(what: str, mean: Tensor, error: Tensor, predicted: float) -> None:
        gap = float(mean - predicted)
        rows.append([what, predicted, float(mean), 100 * gap / predicted, gap / float(error)])

    for p in WIDTHS:
        weights, teacher = frozen(args.dim, p, args.seed)
        mean, error = compare(random_features(weights, teacher, generator), SAMPLES, RIDGES, args.draws)
        moments = random_feature_moments(weights, torch.tanh, teacher, noise=NOISE)
        for k, ridge in enumerate(RIDGES):
            predicted = float(ridge_generalisation(moments, torch.tensor([SAMPLES]), ridge).test)
            record(f"{p} features, ridge {ridge:g}: test error", mean[0, k], error[0, k], predicted)
            left.errorbar(p, mean[0, k], error[0, k], fmt=".", color=f"C{k}")
    fine = sorted({*WIDTHS, 175, 325, 475, 600, 700, 730, 750, 770, 800, 920})
    curves = torch.zeros(len(RIDGES), len(fine))
    for j, p in enumerate(fine):
        weights, teacher = frozen(args.dim, p, args.seed)
        moments = random_feature_moments(weights, torch.tanh, teacher, noise=NOISE)
        for k, ridge in enumerate(RIDGES):
            curves[k, j] = ridge_generalisation(moments, torch.tensor([SAMPLES]), ridge).test[0]
    for k, ridge in enumerate(RIDGES):
        left.semilogy(fine, curves[k], color=f"C{k}", label=f"ridge {ridge:g}")
    left.set(title=f"test error, {SAMPLES} samples", xlabel="features p")
    weights, teacher = frozen(args.dim, 250, args.seed)
    moments = random_feature_moments(weights, torch.tanh, teacher, noise=NOISE)
    panel(middle, random_features(weights, teacher, generator), moments, "250 tanh features", args.draws, record)
    draw, moments = trained_features(args.seed)
    panel(right, draw, moments, "trained network", args.draws, record)
    omega, phi, rho = moments
    best = float(rho - phi @ torch.linalg.pinv(omega, hermitian=True) @ phi)
    many = torch.tensor([c for c in COUNTS if c >= 300])
    right.loglog(many, 2 * len(phi) / many * best, "k:", label="2 p / n")
    for axis in (left, middle, right):
        axis.legend(fontsize=7)
    header = ["what", "predicted", "measured", "difference, %", "in standard errors"]
    worst = [max(abs(float(r[c])) for r in rows) for c in (3, 4)]
    rms = math.sqrt(sum(float(r[4]) ** 2 for r in rows) / len(rows))
    text = table(header, rows) + f"\nRoot mean square of the differences in standard errors: {rms:.2f}.\n"
    save(args, "replica", text, {"rows": rows, "worst": worst, "rms": rms}, made, begun)


if __name__ == "__main__":
    main()
