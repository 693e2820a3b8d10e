#!/usr/bin/env python3
"""Transient chaos: the length, the turns and the curvature of a circle through the layers of a wide network.

    python recipes/theory/curves.py [--width 1000] [--depth 10] [--networks 16]

A great circle of inputs (q = 1) passes through random tanh networks, ordered and chaotic. Lines: the recursions of
Poole et al. 2016. Dots: exact derivatives along the circle in networks of the given width, mean of several. Right: the
circle as two units of layer 5 of a chaotic network see it. A quarter of a minute on one core.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from recipes.theory.report import arguments, figure, save, table
from torch_meanfield.theory.curves import CurveGeometry, measure_curve, propagate_circle
from torch_meanfield.theory.phase import phase

SETTINGS = ((0.8, 0.3), (1.5, 0.3), (2.5, 0.3), (4.0, 0.3))  # sigma_w, sigma_b
NAMES = ("length", "grassmannian", "curvature")


def layers(
    activation: Callable[[Tensor], Tensor], width: int, depth: int, sigma_w: float, sigma_b: float, seed: int
) -> Callable[[Tensor], Tensor]:
    """Angles ``(M,)`` to the pre-activations of all layers of one random network, ``(M, depth + 1, width)``; q = 1."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.linalg.qr(torch.randn(width, 2, generator=generator, dtype=torch.float64))[0] * width**0.5
    weights = torch.randn(depth, width, width, generator=generator, dtype=torch.float64) * sigma_w / width**0.5
    biases = torch.randn(depth, width, generator=generator, dtype=torch.float64) * sigma_b

    def image(theta: Tensor) -> Tensor:
        h = theta.cos()[:, None] * plane[:, 0] + theta.sin()[:, None] * plane[:, 1]
        seen = [h]
        for weight, bias in zip(weights, biases, strict=True):
            h = activation(h) @ weight.T + bias
            seen.append(h)
        return torch.stack(seen, 1)

    return image


def measured(
    activation: Callable[[Tensor], Tensor], width: int, depth: int, w: float, b: float, networks: int, seed: int,
    angles: int = 64,
) -> tuple[CurveGeometry, Tensor]:  # fmt: skip
    """Mean over networks (of the curvature: root of the mean square), and the largest relative standard error."""
    found = [measure_curve(layers(activation, width, depth, w, b, seed + k), angles) for k in range(networks)]
    values = torch.stack([torch.stack([f.length, f.grassmannian, f.curvature]) for f in found])
    error = (values.std(0) / values.mean(0) / networks**0.5).amax() if networks > 1 else torch.tensor(float("nan"))
    length, grassmannian, curvature = values[:, 0].mean(0), values[:, 1].mean(0), values[:, 2].square().mean(0).sqrt()
    return CurveGeometry(length, grassmannian, curvature), error


def main() -> None:
    parser = arguments("curves", __doc__)
    parser.add_argument("--width", type=int, default=1_000)
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--networks", type=int, default=16)
    args = parser.parse_args()
    begun = time.perf_counter()
    picture, axes = figure(4)
    rows, curves = [], []
    for i, (w, b) in enumerate(SETTINGS):
        predicted = propagate_circle(torch.tanh, args.depth, w, b)
        found, error = measured(torch.tanh, args.width, args.depth, w, b, args.networks, args.seed)
        limit = phase(torch.tanh, w, b)
        off = [100 * float((getattr(found, n) / getattr(predicted, n) - 1).abs().max()) for n in NAMES]
        growth = [float(getattr(found, n)[-1] / getattr(found, n)[-2]) for n in NAMES[:2]]
        rows.append([w, b, limit.name, float(limit.chi_1) ** 0.5, *growth, float(found.grassmannian[-1] / 6.283185307)])
        rows[-1] += [*off, 100 * float(error)]
        record = {
            n: {"predicted": getattr(predicted, n).tolist(), "measured": getattr(found, n).tolist()} for n in NAMES
        }
        curves.append({"sigma_w": w, "sigma_b": b, **record})
        for axis, name in zip(axes, NAMES, strict=False):
            axis.semilogy(getattr(predicted, name), color=f"C{i}")
            axis.semilogy(getattr(found, name), ".", color=f"C{i}", label=f"sigma_w = {w}, {limit.name}")
    for axis, title in zip(axes, ("length", "Grassmannian length (2 pi: one turn)", "curvature"), strict=False):
        axis.set(title=title, xlabel="layer")
    axes[0].legend(fontsize=7)
    theta = torch.linspace(0, 2 * torch.pi, 2_000, dtype=torch.float64)
    last = layers(torch.tanh, args.width, args.depth, *SETTINGS[2], args.seed)(theta)[:, 5]
    axes[3].plot(*last[:, :2].T, linewidth=0.6)
    axes[3].set(title=f"two units of layer 5, sigma_w = {SETTINGS[2][0]}", aspect="equal")
    header = [
        "sigma_w",
        "sigma_b",
        "phase",
        "root of chi_1",
        "last layer's growth of the length",
        "of the Grassmannian",
    ]
    header += ["turns", "worst error of the length, %", "of the Grassmannian, %", "of the curvature, %"]
    header += ["largest standard error, %"]
    results = {"width": args.width, "networks": args.networks, "rows": rows, "curves": curves}
    save(args, "curves", table(header, rows), results, picture, begun)


if __name__ == "__main__":
    main()
