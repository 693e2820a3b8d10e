#!/usr/bin/env python3
"""A deep residual network by powers of its horizon: the two-layer network, and what comes after it.

    python recipes/theory/expansion.py [--out runs/theory/expansion]

Eight branches of eight tanh units, trained to carry the plane along a swirl at horizon 1, and 48 unit-step branches
trained on a teacher. Left: the first network with its steps scaled down to horizon T, its output against its expansion
to order 0, 1 (a two-layer network) and 2; the errors fall as T, T^2 and T^3. Right: the size of each term of both
networks at their own horizon. A quarter of a minute on one core.
"""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from recipes.theory import deep
from recipes.theory.flows import stack, swirl, train_
from recipes.theory.report import arguments, figure, save, table
from torch_meanfield import MeanFieldSequential
from torch_meanfield.theory import horizon_expansion

HORIZONS = tuple(2.0**-k for k in range(8))


def rms(x: Tensor) -> float:
    """Root mean square."""
    return x.square().mean().sqrt().item()


@torch.no_grad()
def errors(layer: MeanFieldSequential, x: Tensor, order: int) -> dict[int, list[float]]:
    """By order, the error of the expansion at every horizon, the network run with its steps scaled."""
    found: dict[int, list[float]] = {k: [] for k in range(order + 1)}
    tau = layer.tau.detach()
    for c in HORIZONS:
        shorter = copy.deepcopy(layer).set_tau_(c * tau)
        terms, output = horizon_expansion(shorter, x, order), shorter(x)
        for k in found:
            found[k].append(rms(output - torch.stack(terms[: k + 1]).sum(0)))
    return found


def slope(values: list[float]) -> float:
    """Of the logarithms, over the four shortest horizons."""
    a, b = (torch.tensor(v[-4:], dtype=torch.float64).log() for v in (HORIZONS, values))
    return float(((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum())


def main() -> None:
    parser = arguments("expansion", __doc__)
    args = parser.parse_args()
    begun = time.perf_counter()
    batch, layer = swirl(256, args.seed), stack(8, 8, horizon=1.0, seed=args.seed)
    loss = train_(layer, batch, 300)
    found = errors(layer, batch[0], 3)
    slopes = {k: slope(v) for k, v in found.items()}
    teacher, long = deep.Teacher(args.seed), deep.deep_stack(48, args.seed)
    deep.train_(long, teacher, 150)
    sizes = {
        f"8 branches, horizon {layer.tau[-1].item():.2f}": [rms(t) for t in horizon_expansion(layer, batch[0], 4)],
        "48 branches, horizon 48": [rms(t) for t in horizon_expansion(long, teacher.batch(64)[0], 4)],
    }
    picture, (left, right) = figure(2, 5.2)
    for k, values in found.items():
        left.loglog(HORIZONS, values, "o", color=f"C{k}", label=f"order {k}: slope {slopes[k]:.3f}")
        left.loglog(
            HORIZONS, [values[-1] * (c / HORIZONS[-1]) ** (k + 1) for c in HORIZONS], color=f"C{k}", linewidth=0.8
        )
    left.set(title="error of the expansion (lines: T^(k+1))", xlabel="horizon, of the trained one")
    for name, values in sizes.items():
        right.semilogy(values, "o-", label=name)
    right.set(title="size of the k-th term", xlabel="k")
    for axis in (left, right):
        axis.legend(fontsize=8)
    rows = [[k, slopes[k], k + 1, values[0], *(v[k] for v in sizes.values())] for k, values in found.items()]
    text = table(["order", "slope", "predicted", "error at the trained horizon", *sizes], rows)
    text += f"\nThe terms are root mean squares. Loss of the first network {loss:.3g}.\n"
    save(args, "expansion", text, {"errors": found, "slopes": slopes, "sizes": sizes}, picture, begun)


if __name__ == "__main__":
    main()
