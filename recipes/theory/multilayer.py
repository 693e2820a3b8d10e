#!/usr/bin/env python3
"""Fluctuations of networks with two hidden layers: 1/n, as the second-order limit predicts, and trained away.

    python recipes/theory/multilayer.py [--networks 600]

Six points, tanh, full-batch gradient descent. Neurons of the first layer have types (z, b), of the second (c, u), all
standard normal; weights between them 3 sin(z + b + u). Left: n times the mean squared deviation from the limit over
time, networks of width 20 to 200 (thin) and the prediction (squares): it falls to 0 with the loss. Middle: over the
width, at three times. Right: deviations of single networks of 1,000 neurons, drawn from the types that stand for the
limit, beside what the influences of their neurons say. A minute on one core.
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
from torch_meanfield.theory.fluctuations import gaussian_particles
from torch_meanfield.theory.multilayer import (
    Layers,
    Shares,
    layer_influences,
    multilayer_covariance,
    train_layers,
)

POINTS = torch.linspace(-1.5, 1.5, 6, dtype=torch.float64)
X = torch.stack([POINTS, torch.ones_like(POINTS)], 1)
Y = 0.5 * torch.tanh(2 * POINTS)
DT, STEPS = 0.5, 120
TYPES = 256  # of the prediction, which is a mean over four scramblings of them; their outputs need more
MANY = 1_024
TIMES = (0, STEPS // 8, STEPS // 4, STEPS // 2, STEPS)


def of_types(first: Tensor, second: Tensor) -> Layers:
    """The weights at the start of neurons of types ``(..., n1, 2)`` and ``(..., n2, 2)``."""
    phase = first.sum(-1)[..., :, None] + second[..., 1][..., None, :]
    return Layers(first, 3 * torch.sin(phase), second[..., 0])


def limit(types: int = TYPES, seed: int = 0) -> Layers:
    """Evenly spread types that stand for the laws."""
    return of_types(gaussian_particles(types, 2, seed=seed), gaussian_particles(types, 2, seed=seed + 1))


def trained(n: int, networks: int, seed: int, steps: int = STEPS) -> Tensor:
    """Outputs over time of networks of width n: ``(steps + 1, networks, N)``."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for part in torch.arange(networks).split(max(1, 400_000 // n**2)):
        first, second = torch.randn(2, len(part), n, 2, generator=generator, dtype=torch.float64)
        found.append(train_layers(of_types(first, second), X, Y, dt=DT, steps=steps)[0])
    return torch.cat(found, 1)


def drawn(n: int, networks: int, layers: Layers, seed: int) -> Shares:
    """Networks of n neurons in each layer, each of a type of ``layers``: the share of every type."""
    generator = torch.Generator().manual_seed(seed)
    counts = [
        torch.multinomial(torch.ones(networks, m, dtype=torch.float64), n, replacement=True, generator=generator)
        for m in layers.second.shape
    ]
    shares = [
        torch.zeros(networks, m, dtype=torch.float64).scatter_add_(1, at, torch.full(at.shape, 1 / n).double())
        for at, m in zip(counts, layers.second.shape, strict=True)
    ]
    return Shares(*shares)


def one_by_one(n: int, networks: int, layers: Layers, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Deviations of networks drawn from the types, measured and by their influences: ``(networks, N)`` each."""
    f = train_layers(layers, X, Y, dt=DT, steps=steps)[0][-1]
    shares = drawn(n, networks, layers, seed)
    many = Layers(*(t.expand(networks, *t.shape) for t in layers))
    measured = train_layers(many, X, Y, dt=DT, steps=steps, shares=shares)[0][-1] - f
    psi = layer_influences(layers, X, Y, dt=DT, steps=steps)
    return measured, shares.first @ psi[0].T + shares.second @ psi[1].T


def expectations(steps: int, seed: int, types: int = TYPES) -> Tensor:
    """The predicted n times the mean squared deviation, by four scramblings of the types."""
    covariances = [multilayer_covariance(limit(types, seed + 10 * k), X, Y, dt=DT, steps=steps) for k in range(4)]
    return torch.stack([c.diagonal().mean() for c in covariances])


def main() -> None:
    parser = arguments("multilayer", __doc__)
    parser.add_argument("--networks", type=int, default=600, help="of width 63; twice as many of 20, half of 200")
    args = parser.parse_args()
    begun = time.perf_counter()
    f = train_layers(limit(MANY), X, Y, dt=DT, steps=STEPS)[0]
    found = {t: expectations(t, args.seed) for t in TIMES}
    predicted = {t: float(values.mean()) for t, values in found.items()}
    shown = (0, STEPS // 4, STEPS)
    rows, picture, (left, middle, right) = [], *figure(3)
    for n, networks in ((20, 2 * args.networks), (63, args.networks), (200, args.networks // 2)):
        squares = n * (trained(n, networks, args.seed + n) - f[:, None]).square()
        scaled, error = squares.mean((1, 2)), squares.mean(2).std(1) / networks**0.5
        left.semilogy(DT * torch.arange(STEPS + 1), scaled, linewidth=0.8, label=f"n = {n} ({networks} networks)")
        rows.append([str(n)] + [f"{float(scaled[t]):.3g} ± {float(error[t]):.1g}" for t in shown])
        for i, t in enumerate(shown):
            middle.loglog(n, float(scaled[t]), "o", color=f"C{i}", label=f"t = {DT * t:g}" if n == 20 else None)
    rows.append(["predicted"] + [f"{predicted[t]:.3g} ± {float(found[t].std()) / 2:.1g}" for t in shown])
    left.semilogy([DT * t for t in TIMES], list(predicted.values()), "ks", label="predicted")
    left.set(title="n x squared deviation", xlabel="time")
    for i, t in enumerate(shown):
        middle.axhline(predicted[t], color=f"C{i}")
    middle.set(title="n x squared deviation (lines: predicted)", xlabel="n")
    measured, expected = one_by_one(1_000, 200, limit(128), STEPS // 8, args.seed)
    share = 1 - float((measured - expected).square().sum() / measured.square().sum())
    right.plot(expected.flatten(), measured.flatten(), ".", markersize=3)
    right.axline((0, 0), slope=1, color="k", linewidth=0.8)
    right.set(title=f"single networks, t = {DT * STEPS / 8:g}", xlabel="by influences", ylabel="deviation")
    right.tick_params(labelsize=7)
    for axis in (left, middle):
        axis.legend(fontsize=7)
    losses = ((f - Y).square().mean(1) / 2).tolist()
    text = table(["n", *(f"n x squared deviation, t = {DT * t:g}" for t in shown)], rows)
    text += (
        f"\nLoss of the limit {losses[0]:.3g} -> {losses[-1]:.3g}. Of the squared deviations of single networks of "
        f"1,000 neurons at t = {DT * STEPS / 8:g}, the influences of their neurons explain {100 * share:.1f} %.\n"
    )
    results = {"rows": rows, "predicted": predicted, "explained": share, "loss": losses[:: STEPS // 12]}
    save(args, "multilayer", text, results, picture, begun)


if __name__ == "__main__":
    main()
