#!/usr/bin/env python3
"""Fisher information: mean, second moment and largest eigenvalue, predicted and measured; the learning rate it allows.

    python recipes/theory/fisher.py [--width 1000] [--networks 20] [--out runs/theory/fisher]

Random networks of two hidden layers on 100 Gaussian inputs, one output and ten, for activations and variances as in
Karakida et al. 2019. Left: measured over predicted, mean over networks with its standard deviation. Middle: one
network's deviation of the largest eigenvalue against the width. Right: the loss after 30 steps of gradient descent
with a step of r times 2 / lambda_max: beyond r = 1 it leaves. The theory holds at the start, so networks are wide and
targets near to the outputs. A minute on one core.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn

from recipes.theory.report import arguments, figure, save, table
from torch_meanfield.theory.fisher import FisherStatistics, measured_fisher, predicted_fisher

SAMPLES = 100
# activation, its module, sigma_w^2, sigma_b^2: fig. 1 of the paper
SETTINGS: dict[str, tuple[Callable[[Tensor], Tensor], type[nn.Module], float, float]] = {
    "ReLU": (torch.relu, nn.ReLU, 2.0, 0.1),
    "tanh": (torch.tanh, nn.Tanh, 3.0, 0.64),
    "linear": (Tensor.clone, nn.Identity, 1.0, 0.1),
}
STATISTICS = ("mean", "second_moment", "largest")


def network(
    module: type[nn.Module], widths: Sequence[int], variances: tuple[float, float], generator: torch.Generator
) -> nn.Sequential:
    """A random network: weights of variance sigma_w^2 / M, biases of variance sigma_b^2."""
    layers: list[nn.Module] = []
    for m, n in zip(widths[:-1], widths[1:], strict=True):
        layer = nn.Linear(m, n)
        with torch.no_grad():
            layer.weight.normal_(generator=generator).mul_((variances[0] / m) ** 0.5)
            layer.bias.normal_(generator=generator).mul_(variances[1] ** 0.5)
        layers += [layer, module()]
    return nn.Sequential(*layers[:-1])


def compare(name: str, width: int, outputs: int, networks: int, seed: int) -> tuple[FisherStatistics, Tensor]:
    """The prediction, and measured over predicted: ``(networks, 3)``."""
    activation, module, sw2, sb2 = SETTINGS[name]
    widths = [width, width, width, outputs]
    predicted = predicted_fisher(activation, widths, sw2**0.5, sb2**0.5, samples=SAMPLES)
    ratios = []
    for k in range(networks):
        generator = torch.Generator().manual_seed(1000 * seed + k)
        model = network(module, widths, (sw2, sb2), generator)
        found = measured_fisher(model, torch.randn(SAMPLES, width, generator=generator))
        ratios.append([getattr(found, s) / getattr(predicted, s) for s in STATISTICS])
    return predicted, torch.tensor(ratios)


def loss_ratio(name: str, width: int, relative_rate: float, seed: int, steps: int = 30) -> float:
    """The loss after some steps over that before them; the step is a multiple of the predicted 2 / lambda_max."""
    activation, module, sw2, sb2 = SETTINGS[name]
    widths = [width, width, width, 1]
    generator = torch.Generator().manual_seed(seed)
    model = network(module, widths, (sw2, sb2), generator).double()
    x = torch.randn(SAMPLES, width, generator=generator, dtype=torch.float64)
    rate = (
        relative_rate * predicted_fisher(activation, widths, sw2**0.5, sb2**0.5, samples=SAMPLES).critical_learning_rate
    )
    with torch.no_grad():
        target = model(x) + 1e-3 * torch.randn(SAMPLES, 1, generator=generator, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    losses = []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        loss = (model(x) - target).square().sum() / (2 * SAMPLES)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] / losses[0]


def main() -> None:
    parser = arguments("fisher", __doc__)
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--networks", type=int, default=20)
    args = parser.parse_args()
    begun = time.perf_counter()
    picture, (left, middle, right) = figure(3)
    rows, position = [], 0
    for i, name in enumerate(SETTINGS):
        for outputs in (1, 10):
            predicted, ratios = compare(name, args.width, outputs, args.networks, args.seed)
            mean, deviation = ratios.mean(0).tolist(), ratios.std(0).tolist()
            for j, statistic in enumerate(STATISTICS):
                rows.append([name, outputs, statistic, getattr(predicted, statistic), mean[j], deviation[j]])
            left.errorbar([position, position + 1, position + 2], mean, deviation, fmt="o" if outputs == 1 else "s",
                          color=f"C{i}", capsize=2, label=f"{name}, C = {outputs}")  # fmt: skip
            position += 4
        widths = [args.width // 8, args.width // 4, args.width // 2, args.width]
        errors = [(compare(name, w, 1, args.networks, args.seed)[1][:, 2] - 1).square().mean().sqrt() for w in widths]
        middle.loglog(widths, errors, "o-", color=f"C{i}", label=name)
        rates = [0.25, 0.5, 0.75, 0.9, 1.1, 1.25, 1.5, 2.0]
        ends = [loss_ratio(name, args.width, r, args.seed) for r in rates]
        right.semilogy(rates, [max(min(e, 1e6), 1e-6) for e in ends], "o-", color=f"C{i}", label=name)
    left.axhspan(0.9, 1.1, alpha=0.15, color="grey")
    left.set_ylim(0.85, 1.4)
    left.set(title=f"measured / predicted, M = {args.width:,}", xticks=[], xlabel="mean, second moment, largest")
    middle.set(title="one network's deviation of the largest", xlabel="width M")
    right.axvline(1, color="grey")
    right.set(title="loss after 30 steps / before", xlabel="learning rate / predicted 2/$\\lambda_{max}$")
    for axis in (left, middle, right):
        axis.legend(fontsize=7)
    text = table(["activation", "outputs", "statistic", "predicted", "measured / predicted", "deviation of one"], rows)
    save(args, "fisher", text, {"width": args.width, "networks": args.networks, "rows": rows}, picture, begun)


if __name__ == "__main__":
    main()
