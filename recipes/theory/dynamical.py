#!/usr/bin/env python3
"""SGD on a Gaussian mixture in high dimension, step by step, beside its dynamical mean-field theory.

    python recipes/theory/dynamical.py [--dim 1000] [--seeds 3] [--out runs/theory/dynamical]

A linear unit of 1,000 inputs, trained by ``torch.optim.SGD`` on a fixed data set, each sample seen in many steps.
Left: least squares with a teacher, full batch; overlap, norm and training loss. Middle: two clusters, logistic loss;
test error and training loss with batches of all, half and a fifth of the data. Right: three clusters, which no linear
rule separates, logistic loss of h^2 - L^2; full batch, SGD and persistent SGD. Lines: predicted; dots: measured, mean
of the seeds. Ten seconds on one core.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn

from recipes.theory.report import arguments, figure, save, table
from torch_meanfield.theory.dynamical import Dynamics, dynamical_mean_field
from torch_meanfield.theory.latents import Source, gaussian_mixture, mixture_error, teacher_student

THRESHOLD = 0.7  # L


class Problem(NamedTuple):
    """One training: data, loss and the settings that the theory shares with the network."""

    source: Source
    loss: Callable[[Tensor, Tensor], Tensor]
    settings: dict[str, Any]


def square(h: Tensor, y: Tensor) -> Tensor:
    """(h - y)^2 / 2."""
    return (h - y).square() / 2


def logistic(h: Tensor, y: Tensor) -> Tensor:
    """log(1 + e^(-y h))."""
    return nn.functional.softplus(-y * h)


def door(h: Tensor, y: Tensor) -> Tensor:
    """The logistic loss of h^2 - L^2."""
    return nn.functional.softplus(-y * (h.square() - THRESHOLD**2))


TEACHER = Problem(
    teacher_student(), square, {"ratio": 3.0, "rate": 0.1, "steps": 30, "decay": 0.5, "overlap": 0.2, "norm": 1.0}
)
TWO = {"ratio": 2.0, "rate": 0.2, "steps": 40, "decay": 0.1, "overlap": 0.0, "norm": 1.0}
THREE = {"ratio": 3.0, "rate": 0.2, "steps": 40, "decay": 0.1, "overlap": 0.3, "norm": 0.4}
DATA: tuple[dict[str, float], dict[str, float]] = ({"variance": 0.5}, {"variance": 0.2, "outer": 0.5})
BATCHES: dict[str, dict[str, Any]] = {"full batch": {}, "b = 0.5": {"batch": 0.5}, "b = 0.2": {"batch": 0.2}}
WAYS: dict[str, dict[str, Any]] = {
    "full batch": {},
    "SGD, b = 0.3": {"batch": 0.3},
    "persistent SGD, b = 0.3": {"batch": 0.3, "persistence": 1.0},
}


def measure(problem: Problem, d: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Overlap, norm and training loss of a ``nn.Linear(d, 1)`` at every step."""
    settings = {"batch": 1.0, "persistence": None, "decay": 0.0, **problem.settings}
    rate, batch, stay = settings["rate"], settings["batch"], settings["persistence"]
    generator = torch.Generator().manual_seed(seed)
    n = round(settings["ratio"] * d)
    signal, variance, label = problem.source(torch.randn(n, 2, generator=generator, dtype=torch.float64))
    # v is sqrt(d) times the first unit vector: nothing else knows a direction
    x = variance.sqrt()[:, None] * torch.randn(n, d, generator=generator, dtype=torch.float64)
    x[:, 0] = signal
    x /= math.sqrt(d)
    unit = nn.Linear(d, 1, bias=False, dtype=torch.float64)
    w = unit.weight
    with torch.no_grad():
        w.copy_(torch.randn(1, d, generator=generator))
        w[0, 0] = 0
        w *= math.sqrt(d * (settings["norm"] - settings["overlap"] ** 2)) / w.norm()
        w[0, 0] = math.sqrt(d) * settings["overlap"]
    optimizer = torch.optim.SGD([w], lr=rate, weight_decay=settings["decay"])
    inside = torch.rand(n, generator=generator) < batch
    found = []
    for _ in range(settings["steps"] + 1):
        losses = problem.loss(unit(x)[:, 0], label)
        now = w.detach()[0]
        found.append(torch.stack([now[0] / math.sqrt(d), now.square().sum() / d, losses.detach().mean()]))
        optimizer.zero_grad()
        (losses * inside / batch).sum().backward()
        optimizer.step()
        uniform = torch.rand(n, generator=generator)
        if stay is None:
            inside = uniform < batch
        else:
            inside = torch.where(inside, uniform > rate / stay * (1 - batch) / batch, uniform <= rate / stay)
    overlap, norm, loss = torch.stack(found, 1)
    return overlap, norm, loss


def predict(problem: Problem, paths: int = 2**12) -> Dynamics:
    """The theory's answer to the same."""
    return dynamical_mean_field(problem.loss, problem.source, paths=paths, **problem.settings)


PUBLISHED = {0.0: 0.2, 0.1: 0.4293, 0.5: 0.712, 1.0: 0.7848, 2.0: 0.812, 3.0: 0.8143}  # overlap of TEACHER over time


def published() -> list[list[Any]]:
    """Values given elsewhere, beside the theory's: overlaps with the teacher, the error of logistic regression."""
    overlap = predict(TEACHER).overlap
    rows: list[list[Any]] = [
        [f"teacher: overlap at time {t:g}", value, float(overlap[round(t / TEACHER.settings["rate"])])]
        for t, value in PUBLISHED.items()
    ]
    # from w = 0, steps as large as the data allow: what counts is the end
    settings = {"ratio": 0.1674, "rate": 2.0, "steps": 120, "decay": 0.01, "norm": 0.0}
    end = predict(Problem(gaussian_mixture(0.5), logistic, settings))
    error = mixture_error(end.overlap[-1], end.norm[-1], 0.5)
    return [*rows, ["logistic regression, two clusters: error at the end", 0.2478, float(error)]]


def main() -> None:
    parser = arguments("dynamical", __doc__)
    parser.add_argument("--dim", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    begun = time.perf_counter()
    made, axes = figure(3)
    rows: list[list[Any]] = []
    curves: dict[str, Any] = {}
    problems = {"teacher, square loss": (TEACHER, None)}
    for way, extra in BATCHES.items():
        problems[f"two clusters, {way}"] = Problem(gaussian_mixture(**DATA[0]), logistic, TWO | extra), DATA[0]
    for way, extra in WAYS.items():
        data = DATA[1] | {"threshold": THRESHOLD}
        problems[f"three clusters, {way}"] = Problem(gaussian_mixture(**DATA[1]), door, THREE | extra), data
    for index, (name, (problem, data)) in enumerate(problems.items()):
        found = predict(problem)
        runs = torch.stack([torch.stack(measure(problem, args.dim, args.seed + k)) for k in range(args.seeds)])
        measured = dict(zip(("overlap", "norm", "loss"), runs.mean(0), strict=True))
        predicted = {"overlap": found.overlap, "norm": found.norm, "loss": found.loss}
        if data is not None:
            measured["error"] = mixture_error(runs[:, 0], runs[:, 1], **data).mean(0)
            predicted["error"] = mixture_error(found.overlap, found.norm, **data)
        gaps = [float((measured[k] - predicted[k]).abs().max() / predicted[k].abs().max()) for k in predicted]
        rows.append([name, *(100 * gap for gap in gaps), *["-"] * (4 - len(gaps))])
        curves[name] = {k: [predicted[k].tolist(), measured[k].tolist()] for k in predicted}
        axis = axes[0 if data is None else 1 if index < 4 else 2]
        times = problem.settings["rate"] * torch.arange(len(found.loss))
        for k, what in enumerate(("overlap", "norm", "loss") if data is None else ("error", "loss")):
            color = f"C{k if data is None else 2 * ((index - 1) % 3) + k}"
            axis.plot(
                times, predicted[what], color=color, label=what if data is None else f"{what}, {name[14:].strip(' ,')}"
            )
            axis.plot(times[::2], measured[what][::2], ".", color=color, markersize=4)
    for axis, title in zip(axes, ("teacher, least squares", "two clusters, logistic", "three clusters"), strict=True):
        axis.set(title=title, xlabel="rate x step")
        axis.legend(fontsize=6)
    header = [
        "problem",
        *(f"{what}: largest gap over its largest value, %" for what in ("overlap", "norm", "loss", "error")),
    ]
    known = published()
    text = table(header, rows) + "\n" + table(["value", "published", "computed"], known)
    results = {"dim": args.dim, "seeds": args.seeds, "rows": rows, "published": known, "curves": curves}
    save(args, "dynamical", text, results, made, begun)


if __name__ == "__main__":
    main()
