#!/usr/bin/env python3
"""A second-order elliptic equation with variable coefficients in [0, 1]^d, solved by a two-layer network.

    python recipes/theory/pde.py [--dims 1 2 5] [--out runs/pde]

The equation is sum A_ab(x) u_ab + sum b_a(x) u_a + c(x) u = f with A = (1 + |x|^2 / 2d) I + cos(x) cos(x)^T / 4d, b =
sin(pi x), c = -1 - x_1 and the solution u = e^{mean(x)} prod sin(pi x_i), which is 0 on the boundary, as the network
is by its form. Training is L-BFGS on the mean squared residual at scrambled Sobol points; the error is that of u,
relative, in L2, on 10,000 other points. Last panel: the linear rate of gradient descent with a small step, in d = 1 on
a few points, and the bound exp(-N lambda_S t / n) R_S(0). Half a minute on one core.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from recipes.theory.report import arguments, figure, save, table
from torch_meanfield.theory.elliptic import BoundaryNet, Collocation, EllipticOperator
from torch_meanfield.theory.linearised import linear_rate_bound

POINTS = {1: 64, 2: 512, 5: 2000}
WIDTHS = {1: 50, 2: 100, 5: 200}
ITERATIONS = {1: 300, 2: 400, 5: 400}


def diffusion(x: Tensor) -> Tensor:
    """A: symmetric, with eigenvalues between 1 and 1.75."""
    d = x.shape[1]
    scale = 1 + x.square().sum(1) / (2 * d)
    return scale[:, None, None] * torch.eye(d, dtype=x.dtype) + x.cos()[:, :, None] * x.cos()[:, None] / (4 * d)


OPERATOR = EllipticOperator(diffusion, lambda x: torch.sin(math.pi * x), lambda x: -1 - x[:, 0])


def solution(x: Tensor) -> Tensor:
    """u at points ``(..., d)``."""
    return torch.exp(x.mean(-1)) * torch.sin(math.pi * x).prod(-1)


def collocation(d: int, n: int, seed: int) -> Collocation:
    """The equation at Sobol points."""
    x = torch.quasirandom.SobolEngine(d, scramble=True, seed=seed).draw(n, dtype=torch.float64)
    return Collocation(OPERATOR, x, OPERATOR(solution, x))


def solve(d: int, seed: int, iterations: int | None = None) -> tuple[BoundaryNet, list[tuple[float, float, float]]]:
    """Train; (iteration, residual's risk, relative L2 error of u) every tenth of the way."""
    problem = collocation(d, POINTS[d], seed)
    generator = torch.Generator().manual_seed(seed)
    net = BoundaryNet(d, WIDTHS[d], generator=generator)
    test = torch.rand(10_000, d, generator=generator, dtype=torch.float64)
    truth = solution(test)
    iterations = iterations or ITERATIONS[d]
    optimizer = torch.optim.LBFGS(
        net.parameters(),
        max_iter=iterations // 10,
        history_size=50,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        risk = problem.risk(net)
        risk.backward()
        return risk

    curve = []
    for part in range(11):
        with torch.no_grad():
            error = float((net(test) - truth).norm() / truth.norm())
            curve.append((part * (iterations // 10), float(problem.risk(net)), error))
        if part < 10:
            optimizer.step(closure)
    return net, curve


def linear_rate(n: int = 6, width: int = 4096, seed: int = 0, steps: int = 4000) -> dict[str, list[float] | float]:
    """Gradient descent near to the flow, in d = 1, and the bound."""
    problem = collocation(1, n, seed)
    net = BoundaryNet(1, width, output_scale=0.01, weight_scale=3.0, generator=torch.Generator().manual_seed(seed))
    eigenvalues = torch.linalg.eigvalsh(problem.outer_gram(net))
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    rate = 0.5 * n / (width * largest)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    losses = []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        risk = problem.risk(net)
        risk.backward()
        losses.append(risk.item())
        optimizer.step()
    times = rate * torch.arange(steps + 1)
    bound = linear_rate_bound(times, loss=losses[0], width=width, smallest_eigenvalue=smallest, samples=n)
    return {"smallest": smallest, "times": times.tolist(), "losses": losses, "bound": bound.tolist()}


def main() -> None:
    parser = arguments("pde", __doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[1, 2, 5])
    args = parser.parse_args()
    begun = time.perf_counter()
    picture, (left, middle, right) = figure(3)
    rows, curves = [], {}
    for d in args.dims:
        net, curve = solve(d, args.seed)
        curves[d] = curve
        rows.append([d, WIDTHS[d], POINTS[d], curve[-1][0], curve[-1][1], curve[-1][2]])
        left.semilogy([c[0] for c in curve], [c[2] for c in curve], "o-", markersize=3, label=f"d = {d}")
        line = torch.linspace(0, 1, 200, dtype=torch.float64)
        points = torch.full((200, d), 0.4, dtype=torch.float64)
        points[:, 0] = line
        middle.plot(line, net(points).detach(), label=f"d = {d}, network")
        middle.plot(line, solution(points), "k:")
    left.axhline(1e-2, color="grey", linestyle=":")
    left.set(title="relative L2 error of u", xlabel="L-BFGS iteration")
    middle.set(title="u along $x_1$, others 0.4 (dotted: exact)", xlabel="$x_1$")
    rate = linear_rate()
    step = max(1, len(rate["times"]) // 500)
    right.semilogy(rate["times"][::step], rate["losses"][::step], label="gradient descent")
    right.semilogy(rate["times"][::step], rate["bound"][::step], "--", label=r"$e^{-N\lambda_S t/n} R_S(0)$")
    right.set(title="linear rate, d = 1, N = 4,096, n = 6", xlabel="time", ylabel="$R_S$")
    for axis in (left, middle, right):
        axis.legend(fontsize=7)
    text = table(["d", "width", "points", "iterations", "R_S", "relative L2 error"], rows)
    above = max(a / b for a, b in zip(rate["losses"], rate["bound"], strict=True))
    text += f"\nLoss over bound, largest: {above:.4f}; lambda_S = {rate['smallest']:.3g}.\n"
    thinned = {k: v[::step] if isinstance(v, list) else v for k, v in rate.items()}
    save(args, "pde", text, {"rows": rows, "curves": curves, "linear rate": thinned}, picture, begun)


if __name__ == "__main__":
    main()
