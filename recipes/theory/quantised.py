#!/usr/bin/env python3
"""Quantised activations: the depth that N levels allow, predicted, measured in wide networks, and trained.

    python recipes/theory/quantised.py [--width 2048] [--steps 60]

Correlations in random networks of quantised activations decay at the predicted rate; the depth scale grows like a power
of the number of levels (Blumenfeld et al. 2019: 1.82); MLPs on 8x8 digits train about so deep. A minute on one core.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import nn

from recipes.theory.report import arguments, figure, save, table
from recipes.theory.trainable import accuracy, deepest, mlp
from recipes.theory.wide import Setting, measure
from torch_meanfield.theory.quantised import Quantised, quantised_edge

LEVELS, MEASURED = [2**k for k in range(1, 11)], (2, 4, 8, 16)
DEPTHS, LRS = (2, 4, 8, 16, 32, 64), (3e-3, 1e-3)


def main() -> None:
    parser = arguments("quantised", __doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    begun = time.perf_counter()
    edges = {n: quantised_edge(n) for n in LEVELS}
    exponent = {n: math.log2(edges[n].depth_scale / edges[n // 2].depth_scale) for n in LEVELS[1:]}
    settings = [Setting(f"{n}", Quantised(n, edges[n].step), edges[n].sigma_w, 0.0, 1.0, 0.4) for n in MEASURED]
    depth = 12
    _, c = measure(settings, args.width, depth, networks=48, seed=args.seed)
    made, (first, second, third) = figure(3)
    rows, results = [], {}
    for i, n in enumerate(MEASURED):
        scale = edges[n].depth_scale
        end = min(depth, max(2, round(1.5 * scale)))
        # the rate where it is linear, near the fixed point 0: the last two thirds
        start = end // 3
        measured = (end - start) / math.log(c[i, start] / c[i, end])
        first.plot(c[i], ".", color=f"C{i}", label=f"{n} levels")
        first.plot(
            range(start, depth + 1), c[i, start] * torch.exp(-torch.arange(depth + 1 - start) / scale), color=f"C{i}"
        )

        def layer(inputs: int, outputs: int, sigma_w: float = edges[n].sigma_w) -> nn.Module:
            made = nn.Linear(inputs, outputs, bias=False)
            nn.init.normal_(made.weight, std=sigma_w / inputs**0.5)
            return made

        def activation(n: int = n) -> nn.Module:
            return Quantised(n, edges[n].step)

        reached = []
        for d in DEPTHS:
            reached.append(accuracy(lambda d=d: mlp(d, layer, activation), args.steps, LRS, args.seed))
            print(n, d, round(reached[-1], 3), flush=True)
        third.plot(DEPTHS, reached, "o-", color=f"C{i}", label=f"{n} levels")
        rows.append([n, edges[n].step, edges[n].sigma_w, scale, measured, deepest(DEPTHS, reached)])
        results[n] = {"correlation": c[i].tolist(), "depths": DEPTHS, "accuracy": reached}
    first.set(
        title=f"correlation at width {args.width}: predicted rate (lines)", xlabel="layer", yscale="log", ylim=(1e-3, 1)
    )
    second.loglog(LEVELS, [edges[n].depth_scale for n in LEVELS], "o-", label="predicted depth scale")
    top = edges[LEVELS[-1]].depth_scale
    second.plot(LEVELS, [top * (n / LEVELS[-1]) ** 1.82 for n in LEVELS], "--", label="levels$^{1.82}$")
    second.set(title="depth scale", xlabel="levels")
    third.set(title=f"digits named right after {args.steps} steps", xlabel="depth")
    third.set_xscale("log", base=2)
    for axis in (first, second, third):
        axis.legend(fontsize=8)
    for n in LEVELS[len(MEASURED) :]:
        rows.append([n, edges[n].step, edges[n].sigma_w, edges[n].depth_scale, "", ""])
    header = ["levels", "best step", "sigma_w", "depth scale, predicted", "measured", "deepest that learns"]
    text = table(header, rows)
    text += f"\nExponent from {LEVELS[-2]} to {LEVELS[-1]} levels: {exponent[LEVELS[-1]]:.3f} (published: 1.82).\n"
    save(args, "quantised", text, {"rows": rows, "exponents": exponent, "curves": results}, made, begun)


if __name__ == "__main__":
    main()
