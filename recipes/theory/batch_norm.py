#!/usr/bin/env python3
"""Batch norm makes gradients explode: by pi / (pi - 1) in each layer of ReLUs, more in small batches.

    python recipes/theory/batch_norm.py [--width 1024] [--depth 16]

Squared gradient norms of fully connected networks h = W phi(BN(h)) at initialisation, layer by layer, beside the
constant of Yang et al. 2019. About a minute on two cores.
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
from recipes.theory.wide import batch_norm_gradients
from torch_meanfield.theory.batch_norm import batch_norm_gradient_growth

ACTIVATIONS = {"ReLU": torch.relu, "tanh": torch.tanh, "linear": Tensor.clone}
BATCHES = (8, 16, 64, 256)
SKIP = 3  # layers until the covariance is at its fixed point, at either end


def main() -> None:
    parser = arguments("batch_norm", __doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    begun = time.perf_counter()
    made, (left, right) = figure(2)
    rows, measured = [], {}
    for i, (name, phi) in enumerate(ACTIVATIONS.items()):
        rates = []
        for batch in BATCHES:
            seeds = range(args.seed, args.seed + args.seeds)
            curve = torch.stack([batch_norm_gradients(phi, args.width, args.depth, batch, k) for k in seeds]).mean(0)
            inner = curve[SKIP : args.depth - SKIP + 1]
            rates.append(float((inner[0] / inner[-1]) ** (1 / (len(inner) - 1))))
            predicted = batch_norm_gradient_growth(phi, batch).item()
            rows.append([name, batch, predicted, rates[-1], 100 * (rates[-1] / predicted - 1)])
            measured[f"{name}, batch {batch}"] = curve.tolist()
        left.plot(curve / curve[-1], ".", color=f"C{i}", label=f"{name}, batch {BATCHES[-1]}")
        layers = torch.arange(args.depth + 1)
        left.plot(layers, float(predicted) ** (args.depth - layers), color=f"C{i}")
        sizes = list(range(5, 257))
        right.plot(sizes, [batch_norm_gradient_growth(phi, n).item() for n in sizes], color=f"C{i}")
        right.plot(BATCHES, rates, "o", color=f"C{i}", label=name)
        limit = batch_norm_gradient_growth(phi).item()
        right.axhline(limit, color=f"C{i}", linestyle=":", linewidth=1)
        rows.append([name, "infinite", limit, "", ""])
    left.set(title="squared gradient norm: predicted (lines), measured", xlabel="layer", yscale="log")
    right.set(title="growth in one layer (dotted: large batches)", xlabel="batch size", xscale="log")
    for axis in (left, right):
        axis.legend(fontsize=8)
    text = table(["activation", "batch", "predicted growth", "measured", "error, %"], rows)
    save(
        args,
        "batch_norm",
        text,
        {"width": args.width, "depth": args.depth, "rows": rows, "curves": measured},
        made,
        begun,
    )


if __name__ == "__main__":
    main()
