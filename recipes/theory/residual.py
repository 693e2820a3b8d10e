#!/usr/bin/env python3
"""Residual stacks: lengths and gradients grow slower than exponentially, and at horizon 1 hardly at all.

    python recipes/theory/residual.py [--branches 40] [--width 512] [--seeds 6]

``MeanFieldSequential`` of fully connected branches, tanh and ReLU, and the first stage of a ``MeanFieldResNet`` on 8x8
digits, at horizon n (every step 1) and horizon 1 (every step 1 / n): the recurrences of Yang and Schoenholz 2017, with
steps, beside what was measured before every branch. About a minute on two cores.
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
from recipes.theory.stacks import linear_stack, measure_stack, padding_share, resnet_stage
from torch_meanfield.theory.batch_norm import batch_norm_gradient_growth
from torch_meanfield.theory.residual import normalized_residual_propagation, residual_propagation

STACKS = {"tanh branches": (torch.tanh, 1.0), "ReLU branches": (torch.relu, 2**0.5)}


def stack(name: str, n: int, horizon: float, width: int) -> tuple[tuple[Tensor, Tensor, Tensor], Any]:
    """One drawing: what was measured, and what was predicted from its first length and correlation."""
    if name in STACKS:
        phi, sigma_w = STACKS[name]
        layer = linear_stack(phi, n, width, horizon, sigma_w)
        p, product, gradient = measure_stack(layer, torch.randn(16, width))
        start = {"p": p[0], "c": product[0] / p[0]}
        return (p, product / p, gradient), residual_propagation(phi, layer.steps().detach(), sigma_w, **start)
    layer, x = resnet_stage(n, horizon, batch=128)
    p, product, gradient = measure_stack(layer, x)
    he = 2 * padding_share(8)
    predicted = normalized_residual_propagation(
        torch.relu, layer.steps().detach(), variance=he, gain=he, p=p[0], c=product[0] / p[0]
    )
    return (p, product / p, gradient), predicted


def main() -> None:
    parser = arguments("residual", __doc__)
    parser.add_argument("--branches", type=int, default=40)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=6)
    args = parser.parse_args()
    begun, n = time.perf_counter(), args.branches
    made, axes = figure(3)
    rows, curves = [], {}
    for axis, name in zip(axes, (*STACKS, "MeanFieldResNet stage"), strict=True):
        for i, horizon in enumerate((float(n), 1.0)):
            logs = []
            for seed in range(args.seeds):
                torch.manual_seed(args.seed + seed)
                (p, _, gradient), r = stack(name, n, horizon, args.width)
                logs.append(torch.stack([p / p[0], gradient / gradient[-1], r.p / p[0], r.gradient]).log())
            p, gradient, p_predicted, gradient_predicted = torch.stack(logs).mean(0).exp()
            label = f"horizon {horizon:g}"
            axis.plot(p_predicted, color=f"C{i}")
            axis.plot(p, ".", color=f"C{i}", label=f"length, {label}")
            axis.plot(gradient_predicted, color=f"C{i + 2}")
            axis.plot(gradient, ".", color=f"C{i + 2}", label=f"squared gradient, {label}")
            rows.append([name, horizon, p_predicted[-1].item(), p[-1].item()])
            rows[-1] += [gradient_predicted[0].item(), gradient[0].item()]
            curves[f"{name}, {label}"] = {
                "length": p.tolist(),
                "length_predicted": p_predicted.tolist(),
                "gradient": gradient.tolist(),
                "gradient_predicted": gradient_predicted.tolist(),
            }
        axis.set(title=name, xlabel="branch", yscale="log")
    plain = batch_norm_gradient_growth(torch.relu).item() ** (2 * torch.arange(n, -1, -1.0))
    axes[2].plot(plain, color="black", linestyle=":", label="gradient without skip connections")
    axes[2].set_ylim(0.5, 1e6)
    for axis in axes:
        axis.legend(fontsize=7)
    header = ["stack", "horizon", "length x, predicted", "measured", "squared gradient x, predicted", "measured"]
    results = {"branches": n, "width": args.width, "seeds": args.seeds, "rows": rows, "curves": curves}
    save(args, "residual", table(header, rows), results, made, begun)


if __name__ == "__main__":
    main()
