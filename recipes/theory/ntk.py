#!/usr/bin/env python3
"""The tangent kernel: the linear rate under a training curve, and training as the linearised network predicts it.

    python recipes/theory/ntk.py [--widths 64 256 1024 4096] [--out runs/theory/ntk]

Left: h(x) = sum_k a_k relu(w_k . x), N = 4,096, on n random points of the sphere in d dimensions, trained by gradient
descent with a small step; the bound exp(-N lambda_S t / n) R_S(0) with lambda_S the smallest eigenvalue of the
arc-cosine kernel. Middle and right: digits 0 and 1 of scikit-learn, the same network scaled by 1 / sqrt(N), beside the
prediction of its linearisation from the empirical kernel at the start; the largest deviation on test digits over the
training falls like 1 / sqrt(N). A quarter of a minute on one core.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from recipes.theory.report import arguments, figure, save, table
from recipes.theory.two_layer import TwoLayer, descend_
from torch_meanfield.theory.arc_cosine import inner_kernel, outer_kernel
from torch_meanfield.theory.linearised import LinearisedTraining, linear_rate_bound
from torch_meanfield.theory.ntk import empirical_ntk

D, SAMPLES, GAMMA = 8, 24, 0.1  # of the linear rate
TRAIN, TEST, STEPS = 40, 60, 200  # of the digits
SNAPSHOTS = (1, 2, 5, 10, 20, 50, 100, 200)


def linear_rate(width: int, seed: int) -> dict[str, list[float] | float]:
    """A training curve in time, and the bound."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(SAMPLES, D, generator=generator, dtype=torch.float64), dim=1)
    y = torch.sin(3 * x[:, 0]) * x[:, 1] + x[:, 2]
    smallest = torch.linalg.eigvalsh(outer_kernel(x))[0].item()
    model = TwoLayer(D, width, scale=1.0, gamma=GAMMA, generator=generator)
    largest = torch.linalg.eigvalsh(outer_kernel(x) + inner_kernel(x, output_variance=GAMMA**2))[-1].item()
    dt = 0.1 * SAMPLES / (width * largest)  # a tenth of the fastest mode's time: near to the flow
    steps = round(4 * SAMPLES / (width * smallest) / dt)
    losses = descend_(model, x, y, dt, steps)
    times = dt * torch.arange(steps + 1)
    bound = linear_rate_bound(times, loss=losses[0], width=width, smallest_eigenvalue=smallest, samples=SAMPLES)
    return {"smallest": smallest, "times": times.tolist(), "losses": losses, "bound": bound.tolist()}


def digits(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """0 against 1, unit length: training images, their targets -1 and 1, test images."""
    from sklearn.datasets import load_digits

    data = load_digits()
    two = torch.as_tensor(data.target) < 2
    x = torch.nn.functional.normalize(torch.as_tensor(data.data, dtype=torch.float64)[two], dim=1)
    y = 2.0 * torch.as_tensor(data.target, dtype=torch.float64)[two] - 1
    order = torch.randperm(len(x), generator=generator)
    return x[order[:TRAIN]], y[order[:TRAIN]], x[order[TRAIN : TRAIN + TEST]]


def deviation(width: int, seed: int) -> tuple[float, dict[str, list[float]]]:
    """The largest difference on test digits between a trained network and its linearisation, and their losses."""
    generator = torch.Generator().manual_seed(seed)
    x, y, test = digits(generator)
    model = TwoLayer(x.shape[1], width, scale=1 / math.sqrt(width), gamma=1.0, generator=generator)
    kernel, cross = empirical_ntk(model, x), empirical_ntk(model, test, x)
    with torch.no_grad():
        start, start_test = model(x), model(test)
    rate = 0.5 * TRAIN / torch.linalg.eigvalsh(kernel)[-1].item()
    linear = LinearisedTraining(kernel, start, y, learning_rate=rate)
    losses, worst, done = [], 0.0, 0
    for step in SNAPSHOTS:
        losses += descend_(model, x, y, rate, step - done)[:-1]
        done = step
        with torch.no_grad():
            worst = max(worst, (model(test) - linear.predict(step, cross, start_test)).abs().max().item())
    return worst, {"network": losses, "linearised": [linear.loss_at(t) for t in range(STEPS)]}


def main() -> None:
    parser = arguments("ntk", __doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    begun = time.perf_counter()
    rate = linear_rate(max(args.widths), args.seed)
    picture, (left, middle, right) = figure(3)
    times = torch.tensor(rate["times"])
    step = max(1, len(times) // 500)
    left.plot(times[::step], rate["losses"][::step], label="trained network")
    left.plot(times[::step], rate["bound"][::step], "--", label=r"$e^{-N\lambda_S t/n} R_S(0)$")
    left.set(title=f"linear rate, N = {max(args.widths):,}", xlabel="time", ylabel="$R_S$", yscale="log")
    rows, curves = [], {}
    for i, width in enumerate(args.widths):
        seeds = [deviation(width, args.seed + k) for k in range(args.seeds)]
        mean = sum(worst for worst, _ in seeds) / len(seeds)
        rows.append([width, mean, mean * math.sqrt(width)])
        curves[width] = seeds[0][1]
        middle.plot(seeds[0][1]["network"], color=f"C{i}", label=f"N = {width:,}")
        middle.plot(seeds[0][1]["linearised"], "--", color=f"C{i}")
    middle.set(title="digits: network, and linearised (dashed)", xlabel="step", ylabel="R", xscale="log", yscale="log")
    right.loglog([r[0] for r in rows], [r[1] for r in rows], "o-", label="largest deviation, test digits")
    right.loglog(
        [r[0] for r in rows], [rows[0][1] * math.sqrt(rows[0][0] / r[0]) for r in rows], ":", label="$N^{-1/2}$"
    )
    right.set(title="linearised against trained", xlabel="N")
    for axis in (left, middle, right):
        axis.legend(fontsize=8)
    above = max(a / b for a, b in zip(rate["losses"], rate["bound"], strict=True))
    text = f"Loss over bound, largest over the training: {above:.4f} (lambda_S = {rate['smallest']:.3e}).\n\n"
    text += table(["N", "largest deviation on test digits", "times sqrt(N)"], rows)
    thinned = {k: v[::step] if isinstance(v, list) else v for k, v in rate.items()}
    save(
        args,
        "ntk",
        text,
        {"loss over bound": above, "linear rate": thinned, "rows": rows, "curves": curves},
        picture,
        begun,
    )


if __name__ == "__main__":
    main()
