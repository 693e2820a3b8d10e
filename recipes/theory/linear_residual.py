#!/usr/bin/env python3
"""Residual networks that are linear in what they learn: the linear rate, and what they lose, on Fashion-MNIST.

    python recipes/theory/linear_residual.py --data data

Networks of 5, 10 and 20 layers on principal components of the images. Left: loss of full-batch gradient descent on 20
images, with the rate that the smallest eigenvalue of the tangent kernel at the end gives (black). Middle: the squared
gradient over twice the loss, and the two constants of the inequality, at the weights of each time. Right: test accuracy
of RKHS residuals, whose features stay, and of residuals with one hidden layer, all of which is trained. Reads
Fashion-MNIST from the given folder. A minute on one core.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from recipes.images.sources import Torchvision
from recipes.theory.report import arguments, figure, save, table
from torch_meanfield.theory.linear_residual import LinearResNet, polyak_lojasiewicz

LAYERS = (5, 10, 20)
FEW, TRAIN, TEST = 20, 2_000, 2_000
DIM, WIDE, FEATURES = 16, 64, 128
LENGTH = 1.2
DT, STEPS, RECORDS = 4.0, 1_200, 12
BATCH, EPOCHS, RATE = 100, 10, 3e-3


def components(train: Tensor, test: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The first principal components of ``(N, pixels)``, scaled alike to a mean square of 1; float64."""
    mean = train.mean(0)
    basis = torch.linalg.eigh((train - mean).T @ (train - mean))[1][:, -dim:]
    parts = [(t - mean) @ basis for t in (train, test)]
    return parts[0] / parts[0].square().mean().sqrt(), parts[1] / parts[0].square().mean().sqrt()


def descend(
    model: LinearResNet, x: Tensor, y: Tensor, dt: float, steps: int, records: int = RECORDS
) -> tuple[list[float], list[list[float]]]:
    """Gradient descent; the loss at each step, and at some: time, |gradient|^2 / 2E, and both constants."""
    depth, losses, seen = len(model.weight), [], []
    for step in range(steps + 1):
        loss = (model(x) - y).square().sum() / (2 * len(x))
        (gradient,) = torch.autograd.grad(loss, model.weight)
        losses.append(float(loss.detach()))
        if step % (steps // records) == 0:
            ratio = depth * float(gradient.square().sum()) / (2 * losses[-1])
            seen.append([dt * step, ratio, *(float(c) for c in polyak_lojasiewicz(model, x))])
        with torch.no_grad():
            model.weight -= dt * depth * gradient
    return losses, seen


def accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], layers: int, *, train_features: bool, seed: int,
    epochs: int = EPOCHS,
) -> float:  # fmt: skip
    """Share of the test images that are named right after training by Adam on the cross-entropy."""
    (x, y), generator = train, torch.Generator().manual_seed(seed)
    model = LinearResNet(x.shape[1], 10, layers, FEATURES, length=8.0, train_features=train_features, seed=seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    with torch.no_grad():
        return float((model(test[0]).argmax(1) == test[1]).double().mean())


def main() -> None:
    parser = arguments("linear_residual", __doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with FashionMNIST/raw")
    args = parser.parse_args()
    begun = time.perf_counter()
    splits = []
    for split, count in (("train", TRAIN), ("test", TEST)):
        images = Torchvision("fashion-mnist", args.data).decode(split)
        splits.append((images.pixels[:count].flatten(1).double() / 255, images.labels[:count]))
    picture, (left, middle, right) = figure(3)
    rows, results = [], {}
    x = components(splits[0][0], splits[1][0], DIM)[0][:FEW]
    y = torch.nn.functional.one_hot(splits[0][1][:FEW], 10).double()
    wide = components(splits[0][0], splits[1][0], WIDE)
    data = [(part, labels) for part, (_, labels) in zip(wide, splits, strict=True)]
    for i, layers in enumerate(LAYERS):
        model = LinearResNet(DIM, 10, layers, FEATURES, length=LENGTH, seed=args.seed)
        losses, seen = descend(model, x, y, DT, STEPS)
        tail = torch.tensor(losses[-STEPS // 6 :], dtype=torch.float64).log()
        rate = float(tail[0] - tail[-1]) / (DT * (len(tail) - 1)) / 2
        times, ratio, tangent, bound = (torch.tensor(column) for column in zip(*seen, strict=True))
        # a step of gradient descent shrinks the slowest mode by 1 - dt mu
        expected = float(-torch.log1p(-DT * tangent[-1].double()) / DT)
        both = [accuracy(*data, layers, train_features=t, seed=args.seed) for t in (False, True)]
        rows.append([layers, float(bound[0]), float(tangent[0]), float(bound[-1]), expected, rate, rate / expected])
        rows[-1] += [100 * v for v in both]
        results[f"layers {layers}"] = {"loss": losses[:: STEPS // 60], "constants": seen}
        at = DT * torch.arange(len(losses))
        left.semilogy(at, losses, color=f"C{i}", label=f"{layers} layers")
        half = len(losses) // 2
        left.semilogy(at[half:], losses[-1] * torch.exp(2 * expected * (at[-1] - at[half:])), "k:")
        middle.semilogy(times, ratio, "o-", color=f"C{i}", label=f"{layers} layers: measured" if i == 0 else None)
        middle.semilogy(times, tangent, "--", color=f"C{i}", label="tangent kernel" if i == 0 else None)
        middle.semilogy(times, bound, ":", color=f"C{i}", label="bound" if i == 0 else None)
    for k, label in enumerate(("RKHS residuals", "one hidden layer")):
        right.plot(LAYERS, [row[7 + k] for row in rows], "o-", label=label)
    left.set(title="loss (dotted: the rate at the end)", xlabel="time")
    middle.set(title="squared gradient over twice the loss", xlabel="time")
    right.set(title="test accuracy, %", xlabel="layers")
    for axis in (left, middle, right):
        axis.legend(fontsize=7)
    header = ["layers", "bound at the start", "tangent kernel at the start", "bound at the end"]
    header += ["rate at the end: predicted", "measured", "measured / predicted", "RKHS, %", "one hidden layer, %"]
    save(args, "linear_residual", table(header, rows), {"rows": rows, **results}, picture, begun)


if __name__ == "__main__":
    main()
