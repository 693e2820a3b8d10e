#!/usr/bin/env python3
"""A deep residual network as a kinetic equation: what it does to the law of its inputs.

    python recipes/theory/kinetic.py [--inputs 100000] [--out runs/theory/kinetic]

Left: E[x] and E[x^2] of the stream of a ``MeanFieldSequential`` of 400 linear blocks at horizon 4, w = -1, b = 0 and
b = 2: closed forms (lines), measured (dots). Middle: blocks x -> tanh(wx + b) + noise; histograms of the stream at
four depths beside the finite-volume solution of the Fokker-Planck equation and its steady state (dotted). Right: a
stochastic network that is not trained but solved for: two clusters become the wanted Gaussian. Ten seconds on one core.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn

from recipes.theory.report import arguments, figure, save, table
from torch_meanfield import MeanFieldSequential
from torch_meanfield.theory.kinetic import fit_linear, fokker_planck, linear_moments, steady_state

BLOCKS, HORIZON = 400, 4.0
EDGES = torch.linspace(-6.0, 6.0, 401, dtype=torch.float64)
DEPTHS = (0.5, 1.0, 2.0, 4.0)
MERGE = 8  # cells counted together, so that sampling noise does not hide the rest
WANTED = (0.8, 0.25)  # mean and variance
Row = list[Any]
Activation = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """x -> sigma(wx + b) + K xi / sqrt(dt): through a step dt, the noise adds K^2 dt to the variance."""

    def __init__(self, activation: Activation, weight: float, bias: float, noise: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(bias, dtype=torch.float64))
        self.activation, self.noise = activation, noise

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = self.activation(self.weight * x + self.bias)
        return moved + self.noise * torch.randn_like(x) if self.noise else moved


def network(
    activation: Activation, weight: float, bias: float, noise: float = 0.0, blocks: int = BLOCKS
) -> MeanFieldSequential:
    """A stack of blocks at horizon 4 in float64; ``noise`` is K."""
    step = HORIZON / blocks
    made = (Block(activation, weight, bias, noise / math.sqrt(step)) for _ in range(blocks))
    return MeanFieldSequential(*made, horizon=HORIZON, learn_tau=False).double()


@torch.no_grad()
def stream(layer: MeanFieldSequential, x: Tensor) -> list[Tensor]:
    """The inputs as they stand before each block and at the end."""
    found: list[Tensor] = []
    hooks = [b.register_forward_pre_hook(lambda _, args: found.append(args[0])) for b in layer if isinstance(b, Block)]
    found.append(layer(x))
    for hook in hooks:
        hook.remove()
    return found


def shares(x: Tensor) -> Tensor:
    """The histogram of x over the cells; what lies outside counts with the cells at the ends."""
    cell = torch.bucketize(x, EDGES[1:-1])
    return torch.bincount(cell, minlength=len(EDGES) - 1).double() / len(x)


def total_variation(a: Tensor, b: Tensor) -> float:
    """Half the sum of |a - b| over cells, eight together."""
    return float((a - b).reshape(-1, MERGE).sum(1).abs().sum() / 2)


def beside(axis: Any, activation: Activation, parameters: tuple[float, float, float], x: Tensor) -> list[Row]:
    """Histograms of the stream at four depths and the equation's solution, drawn; rows for the table."""
    weight, bias, noise = parameters
    flow = stream(network(activation, weight, bias, noise), x)

    def velocity(z: Tensor) -> Tensor:
        return activation(weight * z + bias)

    path = fokker_planck(velocity, noise, EDGES, shares(x), torch.tensor(DEPTHS))
    width, centre = float(EDGES[1] - EDGES[0]), (EDGES[1:] + EDGES[:-1]) / 2
    rows: list[Row] = []
    for k, (depth, share) in enumerate(zip(DEPTHS, path, strict=True)):
        measured = shares(flow[round(depth / HORIZON * BLOCKS)])
        rows.append([f"total variation at time {depth:g}, %", 100 * total_variation(measured, share)])
        axis.plot(centre, share / width, color=f"C{k}", label=f"t = {depth:g}")
        dots = measured.reshape(-1, MERGE).sum(1) / (MERGE * width)
        axis.plot(centre.reshape(-1, MERGE).mean(1), dots, ".", color=f"C{k}", markersize=4)
    axis.plot(centre, steady_state(velocity, noise, EDGES) / width, "k:", label="steady")
    axis.set(xlabel="x", xlim=(-4.5, 4.5))
    rows.append(["E[x^2] at the end over predicted", float(flow[-1].square().mean() / (path[-1] @ centre.square()))])
    return rows


def main() -> None:
    parser = arguments("kinetic", __doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    args = parser.parse_args()
    begun = time.perf_counter()
    torch.manual_seed(args.seed)
    made, (left, middle, right) = figure(3)
    times = torch.linspace(0, HORIZON, BLOCKS + 1, dtype=torch.float64)
    rows: list[Row] = []

    x = 1.0 + 0.5 * torch.randn(args.inputs, dtype=torch.float64)
    for i, bias in enumerate((0.0, 2.0)):
        flow = stream(network(lambda z: z, -1.0, bias), x)
        mean, variance = float(x.mean()), float(x.var(correction=0))
        predicted = linear_moments(times, weight=-1.0, bias=bias, mean=mean, variance=variance)
        measured = torch.stack([torch.stack([s.mean(), s.square().mean()]) for s in flow])
        for order, curve in enumerate(predicted):
            gap = float((measured[:, order] - curve).abs().max() / curve.abs().max())
            what = f"linear, w = -1, b = {bias:g}: m{order + 1}, largest gap over its largest value, %"
            rows.append([what, 100 * gap])
            left.plot(times, curve, color=f"C{2 * i + order}", label=f"m{order + 1}, b = {bias:g}")
            left.plot(times[::20], measured[::20, order], ".", color=f"C{2 * i + order}")
    left.set(title="moments, identity, w = -1", xlabel="time")

    clusters = torch.cat([x[: len(x) // 2] * 0.6 - 3.1, x[len(x) // 2 :] * 0.6 + 1.4])
    found = beside(middle, torch.tanh, (-2.0, 0.5, 1.0), clusters)
    rows += [[f"tanh(-2x + 0.5), K = 1: {what}", value] for what, value in found]
    middle.set(title="tanh(-2x + 0.5), K = 1")
    mean, variance = WANTED
    weight, bias = fit_linear(mean, variance, noise=1.0)
    found = beside(right, lambda z: z, (weight, bias, 1.0), clusters)
    rows += [[f"fitted, w = {weight:g}, b = {bias:g}, K = 1: {what}", value] for what, value in found]
    right.set(title=f"fitted to N({mean}, {variance})")
    for axis in (left, middle, right):
        axis.legend(fontsize=7)
    # E|p_measured - p| of a binomial share is sqrt(2 p / (pi n))
    still = steady_state(lambda z: weight * z + bias, 1.0, EDGES).reshape(-1, MERGE).sum(1)
    sampling = 100 * float((2 * still / (math.pi * args.inputs)).sqrt().sum() / 2)
    text = table(["what", "measured beside predicted"], rows)
    text += f"\nTotal variation of {args.inputs:,} draws from the fitted law itself: about {sampling:.2f} %.\n"
    save(args, "kinetic", text, {"inputs": args.inputs, "rows": rows, "sampling": sampling}, made, begun)


if __name__ == "__main__":
    main()
