#!/usr/bin/env python3
"""Residual networks of L layers of M units near their mean-field limit, and their loss on the way to 0.

    python recipes/theory/zero_loss.py [--networks 40] [--out runs/theory/zero_loss]

Units a tanh(<w, z> + b) in the plane, standard normal at the start, in the scaling 1 / (LM); sin(2 x) on eight points.
Left: the squared deviation of the trained outputs from those of evenly spread units, times LM, over the number of
units: flat. Middle: evenly spread units, the same in every layer: the deviation from a network of 256 layers falls as
1 / L - 1 / 256, as that of an Euler scheme does. Right: the loss over time: to 0 when there are enough units. A minute
and a half on one core.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from recipes.theory.report import arguments, figure, save, table
from torch_meanfield.theory import gaussian_particles, train_deep_particles

X = torch.linspace(-1.5, 1.5, 8, dtype=torch.float64)
Z, Y = torch.stack([X, torch.zeros_like(X)], 1), torch.sin(2 * X)
READOUT = torch.tensor([0.0, 1.0], dtype=torch.float64)
DT, STEPS = 0.5, 60
SIZES = ((2, 16), (2, 64), (2, 256), (8, 16), (8, 64), (8, 256))
DEPTHS, DEEPEST = (2, 4, 8, 16, 32, 64), 256
LOSSES = ((1, 2), (1, 8), (2, 8), (4, 16), (8, 64))


def field(z: Tensor, theta: Tensor) -> Tensor:
    """The mean of a tanh(<w, z> + b) over the units (a, w, b) of a layer."""
    a, w, b = theta[..., :2], theta[..., 2:4], theta[..., 4]
    return torch.tanh(z @ w.transpose(-1, -2) + b.unsqueeze(-2)) @ a / theta.shape[-2]


def spread(layers: int, units: int, seed: int = 0) -> Tensor:
    """Evenly spread units, the same in every layer; ``(L, M, 5)``."""
    return gaussian_particles(units, 5, seed=seed).expand(layers, units, 5)


def drawn(networks: int, layers: int, units: int, seed: int) -> Tensor:
    """Independent draws; ``(networks, L, M, 5)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(networks, layers, units, 5, generator=generator, dtype=torch.float64)


def trained(theta: Tensor, steps: int) -> Tensor:
    """Outputs over time."""
    return train_deep_particles(field, theta, Z, Y, READOUT, dt=DT, steps=steps)[0]


def deviations(networks: int, seed: int) -> list[list[float]]:
    """L, M, and LM times the mean squared deviation from the evenly spread units: at the start, and trained."""
    rows = []
    for layers, units in SIZES:
        limit = trained(spread(layers, 2**12), STEPS)
        f = trained(drawn(networks, layers, units, seed + layers * units), STEPS)
        scaled = layers * units * (f - limit[:, None]).square().mean((1, 2))
        rows.append([layers, units, scaled[0].item(), scaled[-1].item()])
    return rows


def main() -> None:
    parser = arguments("zero_loss", __doc__)
    parser.add_argument("--networks", type=int, default=40)
    args = parser.parse_args()
    begun = time.perf_counter()
    rows = deviations(args.networks, args.seed)
    deepest = trained(spread(DEEPEST, 128), STEPS)[-1]
    depth = {n: (trained(spread(n, 128), STEPS)[-1] - deepest).square().mean().sqrt().item() for n in DEPTHS}
    losses = {}
    for layers, units in LOSSES:
        f = trained(drawn(9, layers, units, args.seed), 800)
        losses[f"L = {layers}, M = {units}"] = ((f - Y).square().mean(-1) / 2).median(1).values
    wide = (trained(spread(8, 256), 800) - Y).square().mean(-1) / 2
    losses["L = 8, M = 256, evenly spread"] = wide

    picture, (left, middle, right) = figure(3)
    for k, layers in enumerate((2, 8)):
        mine = [r for r in rows if r[0] == layers]
        for column, mark in ((2, "o--"), (3, "s-")):
            label = f"L = {layers}, {'start' if column == 2 else 'trained'}"
            left.loglog([r[0] * r[1] for r in mine], [r[column] for r in mine], mark, color=f"C{k}", label=label)
    left.set(title="LM x squared deviation", xlabel="units LM")
    middle.loglog(list(depth), list(depth.values()), "o")
    laws = {n: v / (1 / n - 1 / DEEPEST) for n, v in depth.items()}
    constant = sum(laws.values()) / len(laws)
    middle.loglog(
        list(depth),
        [constant * (1 / n - 1 / DEEPEST) for n in depth],
        color="k",
        linewidth=0.8,
        label="c (1 / L - 1 / 256)",
    )
    middle.set(title="deviation from 256 layers", xlabel="L")
    middle.set_xscale("log", base=2)
    for name, values in losses.items():
        right.semilogy(DT * torch.arange(len(values)), values, label=name)
    right.set(title="loss (median of nine)", xlabel="time")
    for axis in (left, middle, right):
        axis.legend(fontsize=7)
    text = table(["L", "M", "LM x squared deviation, start", "trained"], rows)
    text += "\n" + table(
        ["L", "deviation from 256 layers", "over 1 / L - 1 / 256"], [[n, v, laws[n]] for n, v in depth.items()]
    )
    ends = [[name, values[0].item(), values[200].item(), values[-1].item()] for name, values in losses.items()]
    text += "\n" + table(["", "loss, start", "time 100", "time 400"], ends)
    save(args, "zero_loss", text, {"deviations": rows, "depth": depth, "losses": ends}, picture, begun)


if __name__ == "__main__":
    main()
