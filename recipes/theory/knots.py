#!/usr/bin/env python3
"""A wide ReLU network of one input, trained with weight decay and a little noise, bends where it was predicted to.

    python recipes/theory/knots.py [--units 500] [--sets 300] [--out runs/theory/knots]

Left and middle: five data, the minimiser found without training (line, its knots as dots) and the function of a
network trained by ``MeanFieldLangevin`` (dashed). Right: the knots in the fullest gap of 300 random data sets of five,
those off the data apart: never more than three. Half a minute on one core.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from recipes.theory.report import arguments, figure, save, table
from torch_meanfield.theory.knots import Knots, knots_between, regularised_knots
from torch_meanfield.theory.langevin import MeanFieldLangevin

PENALTY, NOISE = 0.03, 1e-7  # the noise is a temperature
SCHEDULE = ((0.2, 1500), (0.05, 2500), (0.0125, 3000))
DATA = tuple(
    torch.tensor(rows, dtype=torch.float64)
    for rows in (
        [[-1.9, -0.95, 0.39, 1.45, 1.88], [-0.99, 0.7, 1.6, 1.15, 1.13]],
        [[-1.39, -0.48, 0.13, 1.03, 1.86], [0.65, -0.08, -1.08, -2.26, 0.09]],
    )
)


def objective(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and with the penalty."""
    a, w, b = theta.unbind(-1)
    f = (x[:, None] * w + b).relu() @ a / len(theta)
    loss = (f - y).square().mean() / 2
    return loss, loss.detach() + PENALTY / 2 * theta.detach().square().sum() / len(theta)


def train(
    x: Tensor,
    y: Tensor,
    *,
    units: int,
    steps: float = 1.0,
    schedule: tuple[tuple[float, int], ...] = SCHEDULE,
    seed: int = 0,
) -> Tensor:
    """The particles (a, w, b) after noisy gradient descent in ever smaller steps; ``steps`` scales their number.

    Where a knot sits on a datum, the gradient jumps, and steps that stay large go back and forth across it.
    """
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(units, 3, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = MeanFieldLangevin(
        [theta], lr=schedule[0][0], temperature=NOISE, weight_decay=PENALTY, particles=units, seed=seed
    )
    for lr, count in schedule:
        optimizer.param_groups[0]["lr"] = lr
        for _ in range(round(steps * count)):
            optimizer.zero_grad()
            objective(theta, x, y)[0].backward()
            optimizer.step()
    return theta.detach()


def units_of(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Where each unit bends and by how much."""
    a, w, b = theta.unbind(-1)
    return -b / w, a * w.abs() / len(theta)


def network(theta: Tensor, z: Tensor) -> Tensor:
    """The trained function at points z."""
    a, w, b = theta.unbind(-1)
    return (z[:, None] * w + b).relu() @ a / len(theta)


def beside(axis: Any, data: Tensor, units: int, seed: int) -> list[list[Any]]:
    """One data set: the minimiser and a network, drawn; rows for the table."""
    x, y = data
    found, theta = regularised_knots(x, y, PENALTY), train(x, y, units=units, seed=seed)
    z = torch.linspace(float(x[0]) - 0.2, float(x[-1]) + 0.2, 400, dtype=torch.float64)
    least = found.residual.square().mean() / 2 + PENALTY * found.mass.abs().sum()
    rows: list[list[Any]] = [
        ["objective", float(least), float(objective(theta, x, y)[1])],
        ["largest difference of the functions over their range", 0.0, difference(found, theta, z)],
    ]
    predicted = [k for gap in knots_between(found.location, found.bend, x, apart=1e-6) for k in gap]
    measured = [k for gap in knots_between(*units_of(theta), x, apart=0.03, share=0.01) for k in gap]
    rows.append(["number of knots", len(predicted), len(measured)])
    for knot in predicted:
        near = min(measured, key=lambda k: float((k[0] - knot[0]).abs()))
        where = "at a datum" if float(knot[2]) < 1e-6 else "off the data"
        rows.append([f"a knot {where}: location", float(knot[0]), float(near[0])])
        rows.append([f"a knot {where}: bend", float(knot[1]), float(near[1])])
    axis.plot(z, found(z), label="predicted")
    axis.plot(z, network(theta, z), "--", label="network")
    axis.plot(x, y, "kx", label="data")
    at = torch.stack([k[0] for k in predicted])
    axis.plot(at, found(at), "o", color="C3", label="knots")
    axis.legend(fontsize=7)
    return rows


def difference(found: Knots, theta: Tensor, z: Tensor) -> float:
    """The largest difference over the range of the predicted function."""
    line = found(z)
    return float((network(theta, z) - line).abs().max() / (line.max() - line.min()))


def census(sets: int, seed: int) -> tuple[Counter[int], Counter[int]]:
    """How many knots the fullest gap has, in random data sets; and how many of them off the data."""
    generator = torch.Generator().manual_seed(seed)
    every: Counter[int] = Counter()
    off: Counter[int] = Counter()
    while sum(every.values()) < sets:
        x = torch.rand(5, generator=generator, dtype=torch.float64).mul(4).sub(2).sort().values
        y = torch.randn(5, generator=generator, dtype=torch.float64)
        if float(x.diff().min()) < 0.05:
            continue
        found = regularised_knots(x, y, PENALTY / 3)
        gaps = knots_between(found.location, found.bend, x, apart=1e-6)
        closed = [  # a gap with the knots at both its ends
            sum(float(left) - 1e-6 <= float(k[0]) <= float(right) + 1e-6 for gap in gaps for k in gap)
            for left, right in zip(x[:-1], x[1:], strict=True)
        ]
        every[max(closed)] += 1
        off[max(sum(float(k[2]) > 1e-6 for k in gap) for gap in gaps)] += 1
    return every, off


def main() -> None:
    parser = arguments("knots", __doc__)
    parser.add_argument("--units", type=int, default=500)
    parser.add_argument("--sets", type=int, default=300)
    args = parser.parse_args()
    begun = time.perf_counter()
    made, axes = figure(3)
    rows: list[list[Any]] = []
    for name, axis, data in zip("AB", axes, DATA, strict=False):
        rows += [[f"{name}: {what}", *values] for what, *values in beside(axis, data, args.units, args.seed)]
        axis.set(title=f"data set {name}", xlabel="x")
    x, y = DATA[1]
    least = regularised_knots(x, y, PENALTY)
    best = float(least.residual.square().mean() / 2 + PENALTY * least.mass.abs().sum())
    coarse = train(x, y, units=args.units, schedule=((SCHEDULE[0][0], 4000),), seed=args.seed)
    rows.append(["B, steps of 0.2 to the end: objective", best, float(objective(coarse, x, y)[1])])
    every, off = census(args.sets, args.seed)
    counts = range(max(every) + 1)
    axes[2].bar([c - 0.2 for c in counts], [every[c] for c in counts], 0.4, label="all")
    axes[2].bar([c + 0.2 for c in counts], [off[c] for c in counts], 0.4, label="off the data")
    axes[2].set(title=f"knots in the fullest gap, {args.sets} data sets", xlabel="knots", xticks=list(counts))
    axes[2].legend(fontsize=7)
    text = table(["what", "predicted", "measured"], rows)
    text += "\n" + table(
        ["knots in the fullest gap, its ends included", "data sets", "with so many off the data"],
        [[c, every[c], off[c]] for c in counts],
    )
    results = {"rows": rows, "every": dict(every), "off": dict(off)}
    save(args, "knots", text, results, made, begun)


if __name__ == "__main__":
    main()
