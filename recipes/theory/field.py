#!/usr/bin/env python3
"""Deep and recurrent networks: one kernel in the limit of width, and two ways of approaching it.

    python recipes/theory/field.py [--steps 6] [--networks 1000]

Left: the kernel of two inputs of erf networks over layers or times, predicted (lines) and as the mean of deep and of
recurrent networks of width 200 (dots). Middle: the correlation of times 1 to 6 in recurrent networks, predicted (lines)
and measured. Right: n times the variance of a network's length q at the last step over the width, deep and recurrent,
and the predictions (lines). A quarter of a minute on one core.
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
from torch_meanfield.theory.field import field_kernel, length_variance

SIGMA_W, SIGMA_B = 0.9, 0.3
WIDTHS = (50, 100, 200)
INPUTS = torch.tensor([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, -1.0]], dtype=torch.float64)


def networks(
    activation: Callable[[Tensor], Tensor], inputs: Tensor, steps: int, width: int, count: int, seed: int, *,
    recurrent: bool,
) -> Tensor:  # fmt: skip
    """Pre-activations of ``count`` networks: ``(count, steps + 1, B, width)``, float32."""
    generator = torch.Generator().manual_seed(seed)
    x = inputs.float()
    found = []
    for part in torch.arange(count).split(max(1, 8_000_000 // width**2)):
        m = len(part)

        def weights(m: int = m) -> Tensor:
            return torch.randn(m, width, width, generator=generator) * SIGMA_W / width**0.5

        def biases(m: int = m) -> Tensor:
            return torch.randn(m, 1, width, generator=generator) * SIGMA_B

        read = torch.randn(m, width, x.shape[1], generator=generator) / x.shape[1] ** 0.5
        bias = biases()
        h = x @ read.transpose(1, 2) + bias
        seen = [h]
        if recurrent:
            weight = weights()
        for _ in range(steps):
            if not recurrent:
                weight, bias = weights(), biases()
            h = activation(h) @ weight.transpose(1, 2) + bias
            seen.append(h)
        found.append(torch.stack(seen, 1))
    return torch.cat(found)


def lengths(activation: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """The length that each network gives its next layer, for the first input: ``(count, steps + 1)``."""
    return SIGMA_W**2 * activation(h[:, :, 0]).square().mean(-1).double() + SIGMA_B**2


def main() -> None:
    parser = arguments("field", __doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--networks", type=int, default=1_000)
    args = parser.parse_args()
    begun = time.perf_counter()
    kernels = {r: field_kernel(torch.erf, INPUTS, args.steps, SIGMA_W, SIGMA_B, recurrent=r) for r in (False, True)}
    at = torch.arange(args.steps + 1)
    predicted = kernels[True][at, :, at]
    assert torch.equal(predicted, kernels[False][at, :, at])
    picture, (left, middle, right) = figure(3)
    q = float(predicted[0, 0, 0])
    # the length of layer t + 1 needs h of layer t alone
    expected = [
        float(length_variance(torch.erf, args.steps + 1, SIGMA_W, SIGMA_B, recurrent=r, q=q)[-1]) for r in (False, True)
    ]
    rows, scaled, worst = [], {}, {}
    for recurrent, name in ((False, "deep"), (True, "recurrent")):
        for width in WIDTHS:
            h = networks(torch.erf, INPUTS, args.steps, width, args.networks, args.seed + width, recurrent=recurrent)
            values = width * lengths(torch.erf, h)[:, -1].var()
            scaled[name, width] = float(values)
        found = torch.einsum("mtaw,msbw->tasb", h.double(), h.double()) / (len(h) * width)
        scale = kernels[recurrent].flatten(0, 1).flatten(1).diagonal().sqrt()
        scale = (scale[:, None] * scale).view_as(found)
        worst[name] = float(((found - kernels[recurrent]) / scale).abs().max())
        for i, (a, b) in enumerate(((0, 0), (0, 1))):
            label = f"{name}, {'length' if a == b else 'product'}"
            left.plot(at + 0.06 * recurrent, found[at, a, at, b], "ox"[recurrent], color=f"C{i}", label=label)
        if recurrent:
            for t in range(1, args.steps + 1):
                middle.plot(at, kernels[True][t, 0, :, 1] / scale[t, 0, :, 1], color=f"C{t}")
                middle.plot(at, found[t, 0, :, 1] / scale[t, 0, :, 1], ".", color=f"C{t}", label=f"t = {t}")
    for i, (a, b) in enumerate(((0, 0), (0, 1))):
        left.plot(at, predicted[:, a, b], color=f"C{i}")
    for width in WIDTHS:
        both = [scaled[name, width] for name in ("deep", "recurrent")]
        rows.append([width, *both, both[1] / both[0]])
    means = [sum(row[k] for row in rows) / len(rows) for k in (1, 2)]
    rows += [["mean", *means, means[1] / means[0]], ["predicted", *expected, expected[1] / expected[0]]]
    right.semilogx(WIDTHS, [row[1] for row in rows[:-2]], "o", label="deep")
    right.semilogx(WIDTHS, [row[2] for row in rows[:-2]], "x", label="recurrent")
    for i, value in enumerate(expected):
        right.axhline(value, color=f"C{i}")
    left.set(title="one kernel", xlabel="layer or time")
    middle.set(title="recurrent: correlation of two inputs at times t and s", xlabel="s")
    right.set(title="n x variance of the length", xlabel="width n", ylim=(0, None))
    for axis in (left, middle, right):
        axis.legend(fontsize=7)
    error = (2 / (args.networks * len(WIDTHS))) ** 0.5
    text = table(["width", "n x variance of the length, deep", "recurrent", "ratio"], rows)
    text += (
        f"\nSampling error of a mean over widths: {100 * error:.1f} %. Largest deviation of the mean kernel at width "
        f"{WIDTHS[-1]}, in units of the lengths: deep {worst['deep']:.2g}, recurrent {worst['recurrent']:.2g}.\n"
    )
    results = {"rows": rows, "worst": worst, "sampling_error": error, "predicted": predicted.tolist()}
    save(args, "field", text, results, picture, begun)


if __name__ == "__main__":
    main()
