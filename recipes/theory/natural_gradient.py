#!/usr/bin/env python3
"""Natural gradient descent on populations of particles, beside gradient descent.

    python recipes/theory/natural_gradient.py [--out runs/theory/natural_gradient]

Left: a two-layer network (s/n) sum_i c_i tanh(3 z_i x + 3 b_i), 1,000 units, learns sin(3 x) on 8 points by natural
gradient descent, in the mean-field scaling (s = 1) and in the lazy one (s = n^1/2), with the rate (1 - eta)^(2 k) of
the lazy regime as lines, and by gradient descent at the best of seven learning rates. Middle: over processor time.
Right: a residual MLP of 8 branches on a teacher, 256 inputs: one Fisher matrix, a block for each branch, and Adam at
the best of four rates. Half a minute on one core.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recipes.theory.deep import Teacher, deep_stack
from recipes.theory.report import arguments, figure, save, table
from torch_meanfield.theory import NaturalGradient

UNITS, POINTS, ETAS, BRANCHES, STEPS = 1000, 8, (0.1, 0.3), 8, 50


class Units(nn.Module):
    """(s/n) sum_i c_i tanh(3 z_i x + 3 b_i), standard normal at the start; float64. ``(N, 1)`` to ``(N,)``."""

    def __init__(self, n: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = scale
        self.theta = nn.Parameter(torch.randn(n, 3, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        c, z, b = self.theta.unbind(1)
        return torch.tanh(3 * (x * z + b)) @ c * (self.scale / len(c))


def network(n: int, seed: int, scale: float = 1.0) -> Units:
    """A fresh one."""
    return Units(n, scale, torch.Generator().manual_seed(seed))


def problem(points: int) -> tuple[Tensor, Tensor]:
    """sin(3 x) on evenly spread points of [-1.5, 1.5]."""
    x = torch.linspace(-1.5, 1.5, points, dtype=torch.float64)[:, None]
    return x, torch.sin(3 * x[:, 0])


def run(net: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, steps: int) -> tuple[list[float], list[float]]:
    """Losses, half the mean squared distance, before each step, and the processor's seconds since the start."""
    losses: list[float] = []
    seconds: list[float] = []
    begun = time.process_time()

    def closure() -> tuple[Tensor, Tensor]:
        out = net(x)
        return (out - y).square().sum() / (2 * len(x)), out

    for _ in range(steps):
        if isinstance(optimizer, NaturalGradient):
            loss = optimizer.step(closure)
        else:
            optimizer.zero_grad()
            loss = closure()[0]
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        seconds.append(time.process_time() - begun)
    return losses, seconds


def best(
    make: Callable[[], nn.Module],
    rule: Callable[..., Optimizer],
    rates: tuple[float, ...],
    x: Tensor,
    y: Tensor,
    steps: int,
) -> tuple[float, list[float], list[float]]:
    """The rate with the lowest last loss, with its losses and seconds."""
    runs = []
    for rate in rates:
        net = make()
        runs.append((rate, *run(net, rule([p for p in net.parameters() if p.requires_grad], lr=rate), x, y, steps)))
    return min(runs, key=lambda each: each[1][-1] if each[1][-1] == each[1][-1] else float("inf"))


def main() -> None:
    parser = arguments("natural_gradient", __doc__)
    args = parser.parse_args()
    begun = time.perf_counter()
    x, y = problem(POINTS)
    rows, results = [], {}
    picture, (left, middle, right) = figure(3)
    for k, (regime, scale) in enumerate((("mean field", 1.0), ("lazy", UNITS**0.5))):
        for eta in ETAS:
            net = network(UNITS, args.seed, scale)
            optimizer = NaturalGradient(net.parameters(), lr=eta, damping=1e-12, iterations=200, tolerance=1e-8)
            losses, seconds = run(net, optimizer, x, y, STEPS)
            kept = [v for v in losses if v > 1e-20 * losses[0]]
            early, late = (kept[10] / kept[0]) ** 0.1, (kept[-1] / kept[-6]) ** 0.2
            rows.append(
                [f"natural gradient, {regime}, eta {eta}", losses[-1], early, late, (1 - eta) ** 2, seconds[-1]]
            )
            results[f"{regime} {eta}"] = losses
            style = {"color": f"C{2 * k + ETAS.index(eta)}"}
            left.semilogy(losses, ".", markersize=4, label=f"natural, {regime}, eta = {eta}", **style)
            left.semilogy([losses[0] * (1 - eta) ** (2 * i) for i in range(STEPS)], linewidth=0.6, **style)
            middle.loglog(seconds, losses, **style)
    rates = tuple(UNITS * r for r in (0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0))
    rate, losses, seconds = best(lambda: network(UNITS, args.seed), torch.optim.SGD, rates, x, y, 2000)
    factors = (losses[10] / losses[0]) ** 0.1, (losses[1000] / losses[500]) ** (1 / 500)
    rows.append([f"gradient descent, {rate / UNITS:g} n, 2,000 steps", losses[-1], *factors, "", seconds[-1]])
    results["gradient descent"] = losses[::20]
    left.semilogy(losses[:STEPS], color="k", label=f"gradient descent, {rate / UNITS:g} n")
    middle.loglog(seconds, losses, color="k")

    teacher = Teacher(args.seed)
    data = teacher.batch(256)

    def fresh() -> nn.Module:
        return deep_stack(BRANCHES, args.seed)

    for name, grouped, eta in (("one Fisher matrix", False, 0.3), ("a block for each branch", True, 2 / BRANCHES)):
        net = fresh()
        groups = [{"params": list(b.parameters())} for b in net] if grouped else net.parameters()  # type: ignore[attr-defined]
        optimizer = NaturalGradient(groups, lr=eta, damping=1e-3, iterations=20)
        losses, seconds = run(net, optimizer, *data, 30)
        rows.append([f"8 branches: {name}, eta {eta:.2g}, 30 steps", losses[-1], "", "", "", seconds[-1]])
        results[name] = losses
        right.loglog(seconds, losses, label=name)
    rate, losses, seconds = best(fresh, torch.optim.Adam, (1e-3, 3e-3, 1e-2, 3e-2), *data, 500)
    rows.append([f"8 branches: Adam, {rate:g}, 500 steps", losses[-1], "", "", "", seconds[-1]])
    results["Adam"] = losses[::5]
    right.loglog(seconds, losses, color="k", label=f"Adam, {rate:g}")
    left.set(title="loss (lines: (1 - eta)^(2k))", xlabel="step", ylim=(1e-16, None))
    middle.set(title="loss over processor time", xlabel="seconds", ylim=(1e-16, None))
    right.set(title="residual MLP, 8 branches", xlabel="processor seconds")
    for axis in (left, right):
        axis.legend(fontsize=7)
    text = table(["", "last loss", "factor a step, first ten", "last", "predicted", "processor seconds"], rows)
    save(args, "natural_gradient", text, {"rows": rows, "losses": results}, picture, begun)


if __name__ == "__main__":
    main()
