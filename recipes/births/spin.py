#!/usr/bin/env python3
"""The 3-spin target on the sphere (Rotskoff 2020): the squared error of a mean-field network falls like 1/n.

    python recipes/births/spin.py [--seeds 5] [--out runs/spin]

Target f(x) = (1/d) sum_pqr a_pqr x_p x_q x_r, a standard normal, x uniform on the sphere of radius sqrt(d), d = 10;
f is scaled to unit variance. The network is (1/n) sum_i c_i [x . w_i / sqrt(d) + b_i]_+. Fresh batches, SGD with a
learning rate of n times the time step. The slope is a least-squares line through log error against log n over all
seeds. Plain gradient descent, and birth and death with the wrapper's defaults beside it, from the same weights and over
the same batches.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn

from recipes.births.comparison import Curve, Run, arguments, draw, save, timed
from torch_meanfield.width import BirthDeathOptimizer

DIM, BATCH, STEPS, DT = 10, 100, 4_000, 0.5
WIDTHS = (32, 64, 128, 256)
METHODS: dict[str, dict[str, Any] | None] = {"gradient descent": None, "birth-death": {}}


class MeanField(nn.Module):
    """f_n(x) = (1/n) sum_i c_i [x . w_i / sqrt(d) + b_i]_+, Rotskoff 2020, (1)."""

    def __init__(self, n: int, generator: torch.Generator) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(DIM, n), nn.Linear(n, 1, bias=False)
        with torch.no_grad():
            self.hidden.weight.normal_(generator=generator)
            self.hidden.bias.normal_(generator=generator)
            self.out.weight.normal_(generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(x / math.sqrt(DIM)))).squeeze(1) / self.hidden.out_features


def sphere(count: int, generator: torch.Generator) -> Tensor:
    """Uniform on the sphere of radius sqrt(d); shape ``(count, d)``."""
    return nn.functional.normalize(torch.randn(count, DIM, generator=generator), dim=1) * math.sqrt(DIM)


def spin(a: Tensor, x: Tensor) -> Tensor:
    """(1/d) sum_pqr a_pqr x_p x_q x_r."""
    pairs = (x[:, :, None] * x[:, None]).flatten(1)
    return ((pairs @ a.flatten(0, 1)) * x).sum(1) / DIM


def train(n: int, seed: int, wrapped: dict[str, Any] | None, steps: int = STEPS) -> float:
    """The mean squared error after training, on 20,000 points."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(DIM, DIM, DIM, generator=generator)
    test_x = sphere(20_000, generator)
    test_y = spin(a, test_x)
    scale = test_y.std()
    test_y = test_y / scale
    model = MeanField(n, generator)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=n * DT)
    if wrapped is not None:
        slices = [(model.hidden.weight, 0), (model.hidden.bias, 0), (model.out.weight, 1)]
        optimizer = BirthDeathOptimizer(optimizer, model, populations=slices, seed=seed, **wrapped)
    # towards the end the noise of the batches is averaged away, and the population rests
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=steps)
    for step in range(steps):
        if isinstance(optimizer, BirthDeathOptimizer) and step == steps // 2:
            optimizer.enabled = False
        x = sphere(BATCH, generator)
        loss = (model(x) - spin(a, x) / scale).square().mean() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        return (model(test_x) - test_y).square().mean().item()


def slope(points: Curve) -> float:
    """The least-squares slope of log value against log width."""
    x = torch.tensor([math.log(n) for n, _ in points], dtype=torch.float64)
    y = torch.tensor([math.log(v) for _, v in points], dtype=torch.float64)
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def main() -> None:
    args = arguments("spin", __doc__).parse_args()
    torch.set_num_threads(1)  # the tensors are small: a second thread only waits
    runs: list[Run] = []
    for seed in range(args.seeds):
        for method, wrapped in METHODS.items():
            runs.append(
                timed(
                    "3-spin, d = 10",
                    method,
                    seed,
                    lambda k=seed, w=wrapped: ([(n, train(n, k, w)) for n in WIDTHS], {}),
                )
            )
    lines = [f"| method | {' | '.join(f'n = {n}' for n in WIDTHS)} | slope |", f"| --- |{' --- |' * (len(WIDTHS) + 1)}"]
    slopes = {}
    for method in METHODS:
        curves = [r.curve for r in runs if r.method == method]
        means = [math.exp(sum(math.log(v) for _, v in at) / len(at)) for at in zip(*curves, strict=True)]
        slopes[method] = slope([p for curve in curves for p in curve])
        lines.append(f"| {method} | {' | '.join(f'{m:.2e}' for m in means)} | {slopes[method]:.3f} |")
    text = (
        f"Mean squared error of a target of variance 1, geometric mean over {args.seeds} seeds.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    save(args.out, "spin", text, runs, {"dim": DIM, "steps": STEPS, "dt": DT, "widths": WIDTHS, "slopes": slopes})
    draw(args.out, "spin", runs, "width n", "mean squared error", logx=True)


if __name__ == "__main__":
    main()
