#!/usr/bin/env python3
"""Heavy-tailed weights: gradients cross a deep tanh network over a wider range of sigma_w than with Gaussian ones.

    python recipes/theory/heavy_tails.py [--width 512] [--depth 24]

Tanh networks with alpha-stable weights, alpha = 2 (Gaussian), 1.5 and 1, over a range of sigma_w (Qu et al. 2022): by
what factor a layer changes a typical entry of the gradient, and the mean alpha-th power of the activations beside the
mean-field map. The typical entry is the geometric mean; the norm is made by a few entries that heavy tails single out,
and its range (the last column) widens less. Seconds.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from recipes.theory.report import arguments, figure, save, table
from torch_meanfield.theory.heavy_tails import heavy_tailed_, heavy_tailed_length

ALPHAS = (2.0, 1.5, 1.0)
SIGMAS = tuple(0.3 * 1.1**k for k in range(32))
SHOWN = (1.5, 3.0)  # sigma_w of the table
DEPTHS = (5, 10)  # in so many layers a gradient may change by a factor e


def measure(weights: list[Tensor], alpha: float, sigma_w: float) -> tuple[float, float, float]:
    """Mean |tanh h|^alpha in the second half; log factors of a layer on a gradient's typical entry and norm."""
    h = torch.randn(16, len(weights[0])).requires_grad_()
    start, powers = h, []
    for w in weights:
        h = sigma_w * h.tanh() @ w.T
        powers.append(h.detach().tanh().abs().pow(alpha).mean().item())
    direction = torch.randn_like(h)
    (gradient,) = torch.autograd.grad((h * direction).sum(), start)
    typical = float((gradient.abs().clamp_min(1e-38).log().mean() - direction.abs().log().mean()) / len(weights))
    norm = math.log(float(gradient.norm() / direction.norm())) / len(weights)
    late = powers[len(powers) // 2 :]
    return sum(late) / len(late), typical, norm


def span(rates: Sequence[float], depth: int) -> str:
    """The sigma_w at which gradients change by less than a factor e in ``depth`` layers, and how wide that range is."""
    found = [s for s, r in zip(SIGMAS, rates, strict=True) if abs(r) < 1 / depth]
    return f"{found[0]:.2f} to {found[-1]:.2f}, x {found[-1] / found[0]:.2f}" if found else "none"


def main() -> None:
    parser = arguments("heavy_tails", __doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=24)
    args = parser.parse_args()
    begun = time.perf_counter()
    made, (left, right) = figure(2)
    rows, results = [], {}
    for i, alpha in enumerate(ALPHAS):
        torch.manual_seed(args.seed)
        n = args.width
        weights = [heavy_tailed_(torch.empty(n, n), alpha) for _ in range(args.depth)]  # all sigma_w share them
        measured, rates, norms = zip(*(measure(weights, alpha, s) for s in SIGMAS), strict=True)
        grid = torch.tensor(SIGMAS, dtype=torch.float64)
        # E|tanh|^alpha at the fixed point of the map: 2 (gamma / sigma_w)^alpha
        predicted = (2 * (heavy_tailed_length(torch.tanh, alpha, grid) / grid).pow(alpha)).tolist()
        left.plot(SIGMAS, predicted, color=f"C{i}", label=rf"$\alpha$ = {alpha:g}")
        left.plot(SIGMAS, measured, ".", color=f"C{i}")
        right.plot(SIGMAS, rates, ".-", color=f"C{i}", label=rf"$\alpha$ = {alpha:g}")
        picks = [min(range(len(SIGMAS)), key=lambda k, s=s: abs(SIGMAS[k] - s)) for s in SHOWN]
        rows.append([alpha, *(v[k] for k in picks for v in (predicted, measured))])
        rows[-1] += [*(span(rates, d) for d in DEPTHS), span(norms, DEPTHS[0])]
        results[alpha] = {"sigma_w": SIGMAS, "measured": measured, "predicted": predicted, "log_gradient_rate": rates}
        results[alpha]["log_norm_rate"] = norms
    for depth in DEPTHS:
        right.axhspan(-1 / depth, 1 / depth, color="grey", alpha=0.2)
    left.set(title=r"$E|\tanh h|^\alpha$: predicted (lines), measured", xlabel="sigma_w", xscale="log")
    right.set(title="log factor of a layer on a typical gradient", xlabel="sigma_w", xscale="log")
    for axis in (left, right):
        axis.legend(fontsize=8)
    header = ["alpha"]
    for s in SHOWN:
        header += [f"E\\|tanh\\|^alpha, sigma_w {s:g}", "measured"]
    header += [f"sigma_w at which {d} layers keep typical gradients" for d in DEPTHS]
    header += [f"{DEPTHS[0]} layers keep norms"]
    results = {"width": args.width, "depth": args.depth, "rows": rows, "curves": results}
    save(args, "heavy_tails", table(header, rows), results, made, begun)


if __name__ == "__main__":
    main()
