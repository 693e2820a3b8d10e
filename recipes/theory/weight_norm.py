#!/usr/bin/env python3
"""Weight normalisation: how deep a ReLU network trains with torch's gains and with those of Arpit et al. 2019.

    python recipes/theory/weight_norm.py [--steps 60]

Weight-normalised MLPs of 4 to 128 layers on 8x8 digits, after 60 steps of Adam at the best of two learning rates; and
the lengths in wide ones, layer by layer, beside the length map with sigma_w = g. Two minutes on one core.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from recipes.theory.report import arguments, figure, save, table
from recipes.theory.stacks import digits
from recipes.theory.trainable import WIDTH, accuracy, deepest, mlp
from torch_meanfield.theory.signal import propagate
from torch_meanfield.theory.weight_norm import weight_norm_

DEPTHS, LRS = (4, 8, 16, 32, 64, 128), (1e-3, 1e-4)
WIDE = 1024  # where lengths are measured: at width 64 those of ReLUs scatter by a factor


def default(inputs: int, outputs: int) -> nn.Module:
    """As torch makes it."""
    return weight_norm(nn.Linear(inputs, outputs))


def ours(inputs: int, outputs: int) -> nn.Module:
    """Orthogonal directions and gains of sqrt(2)."""
    return weight_norm_(default(inputs, outputs))


def main() -> None:
    parser = arguments("weight_norm", __doc__)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    begun = time.perf_counter()
    made, (left, right) = figure(2)
    rows, results = [], {}
    for i, (name, layer, gain) in enumerate((("torch's default", default, 3**-0.5), ("Arpit et al.", ours, 2**0.5))):
        reached = []
        for depth in DEPTHS:
            reached.append(accuracy(lambda d=depth, f=layer: mlp(d, f, nn.ReLU), args.steps, LRS, args.seed))
            print(name, depth, round(reached[-1], 3), flush=True)
        right.plot(DEPTHS, reached, "o-", color=f"C{i}", label=name)
        torch.manual_seed(args.seed)
        x, lengths = digits(256).flatten(1).repeat(1, WIDE // WIDTH), []
        for _ in range(32):
            x = layer(WIDE, WIDE)(x).detach()
            lengths.append(x.square().mean().item())
            x = x.relu()
        # torch's default has biases too, of variance 1 / (3 fan-in)
        sigma_b = (3 * WIDE) ** -0.5 if layer is default else 0.0
        predicted = propagate(torch.relu, 31, gain, sigma_b, q=lengths[0]).q
        left.plot(lengths, ".", color=f"C{i}", label=name)
        left.plot(predicted, color=f"C{i}")
        rows.append([name, gain**2, predicted[-1].item(), lengths[-1], deepest(DEPTHS, reached)])
        results[name] = {"depths": DEPTHS, "accuracy": reached, "lengths": lengths, "predicted": predicted.tolist()}
    left.set(title="length q of a width-1,024 network: predicted (lines)", xlabel="layer", yscale="log")
    right.set(title=f"digits named right after {args.steps} steps", xlabel="depth")
    right.set_xscale("log", base=2)
    for axis in (left, right):
        axis.legend(fontsize=8)
    header = ["gains", "g^2", "q in layer 32, predicted", "measured", "deepest that learns"]
    save(args, "weight_norm", table(header, rows), {"rows": rows, "curves": results}, made, begun)


if __name__ == "__main__":
    main()
