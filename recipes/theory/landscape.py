#!/usr/bin/env python3
"""Two isotropic Gaussians: the law of radii under SGD, its partial differential equation, noisy SGD and free energy.

    python recipes/theory/landscape.py [--width 1600] [--dim 40]

Two classes differ in the size of their inputs alone (Mei, Montanari, Nguyen 2018). First: the risk of two-layer
networks under SGD with fresh samples (dots) and the equation for the law of radii (lines). Second: radii at three
times, SGD (filled) and predicted (lines). Third: risk and free energy under noisy SGD, at two temperatures, by the
finite-volume solver. Fourth: the radii it ends with, and the Gibbs law. A minute on one core.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn

from recipes.theory.report import arguments, figure, save, table
from torch_meanfield.theory.langevin import MeanFieldLangevin
from torch_meanfield.theory.radial import RadialProblem
from torch_meanfield.theory.radial_flow import radial_flow, radial_fokker_planck

SCALE = 0.8  # of the initial weights
DELTAS = (0.2, 0.4, 0.8)
DURATION, STEP, BATCH = 6.0, 2.5e-3, 100
RECORDS = 12
STRIDE = 20  # steps of the solvers between two records
DECAY, TEMPERATURES, CELLS, LARGEST = 0.1, (0.1, 1.0), 200, 8.0  # temperatures times d
TEST = 10_000


def samples(problem: RadialProblem, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs ``(count, d)``, float32, and labels."""
    assert problem.dim is not None
    labels = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0)
    x = torch.randn(count, problem.dim, generator=generator)
    return (1 + problem.delta * labels)[:, None] * x, labels


def train(
    problem: RadialProblem,
    width: int,
    seed: int,
    *,
    temperature: float = 0.0,
    decay: float = 0.0,
    duration: float = DURATION,
) -> tuple[Tensor, Tensor]:
    """(Noisy) SGD on fresh samples: risks on a test set ``(RECORDS + 1,)`` and radii ``(RECORDS + 1, width)``."""
    assert problem.dim is not None
    generator = torch.Generator().manual_seed(seed)
    w = nn.Parameter(torch.randn(width, problem.dim, generator=generator) * SCALE / problem.dim**0.5)
    test = samples(problem, TEST, generator)
    optimizer = MeanFieldLangevin(
        [w], lr=2 * STEP, temperature=temperature, weight_decay=decay, particles=width, seed=seed
    )
    risks, radii = [], []
    steps = round(duration / STEP)
    for step in range(steps + 1):
        if step % (steps // RECORDS) == 0:
            with torch.no_grad():
                risks.append((problem.unit(test[0] @ w.T).mean(1) - test[1]).square().mean().double())
                radii.append(w.detach().norm(dim=1).double())
        if step < steps:
            x, y = samples(problem, BATCH, generator)
            loss = (problem.unit(x @ w.T).mean(1) - y).square().mean() / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return torch.stack(risks), torch.stack(radii)


def main() -> None:
    parser = arguments("landscape", __doc__)
    parser.add_argument("--width", type=int, default=1_600)
    parser.add_argument("--dim", type=int, default=40)
    args = parser.parse_args()
    begun = time.perf_counter()
    picture, (left, second, third, fourth) = figure(4)
    times = torch.linspace(0, DURATION, RECORDS + 1)
    rows, results = [], {}
    for i, delta in enumerate(DELTAS):
        problem = RadialProblem(args.dim, delta)
        start = problem.gaussian_radii(100, SCALE)
        risks, radii = train(problem, args.width, args.seed)
        flow = radial_flow(problem, start, duration=DURATION, steps=STRIDE * RECORDS)
        predicted = flow.risk[::STRIDE]
        left.semilogy(torch.linspace(0, DURATION, len(flow.risk)), flow.risk, color=f"C{i}")
        left.semilogy(times, risks, ".", color=f"C{i}", label=f"delta = {delta}")
        radius, expected = float(radii[-1].mean()), float(flow.radii.mean())
        rows.append([f"SGD, delta = {delta}", float(predicted[-1]), float(risks[-1]), expected, radius])
        rows[-1] += [float((risks - predicted).abs().max() / predicted[0]) * 100]
        results[f"risk, delta {delta}"] = {"predicted": predicted.tolist(), "measured": risks.tolist()}
        if delta == DELTAS[-1]:
            bins = torch.linspace(0, 6.5, 40, dtype=torch.float64)
            moved, before = problem.gaussian_radii(400, SCALE), 0
            for j, at in enumerate((RECORDS // 6, RECORDS // 3, RECORDS)):
                more, before = at - before, at
                duration = DURATION * more / RECORDS
                moved = radial_flow(problem, moved, duration=duration, steps=STRIDE * more).radii
                for values, style in ((radii[at], {"alpha": 0.4}), (moved, {"histtype": "step"})):
                    label = f"t = {float(times[at]):g}" if "alpha" in style else None
                    second.hist(values.numpy(), bins=bins.numpy(), density=True, color=f"C{j}", label=label, **style)
    problem = RadialProblem(args.dim, DELTAS[-1])
    law = torch.histc(problem.gaussian_radii(20_000, SCALE), CELLS, 0, LARGEST) / 20_000
    for i, scaled in enumerate(TEMPERATURES):
        temperature = scaled / args.dim
        risks, radii = train(problem, args.width, args.seed + 1, temperature=temperature, decay=DECAY)
        options = {"largest": LARGEST, "temperature": temperature, "decay": DECAY}
        flow = radial_fokker_planck(problem, law, duration=DURATION, steps=STRIDE * RECORDS, **options)
        assert bool((flow.energy.diff() < 1e-12).all())
        predicted = flow.risk[::STRIDE]
        fine = torch.linspace(0, DURATION, len(flow.risk))
        third.plot(fine, flow.risk, color=f"C{i}")
        third.plot(times, risks, ".", color=f"C{i}", label=f"risk, T = {scaled}/d")
        third.plot(fine, flow.energy, ":", color=f"C{i}", label="free energy, predicted")
        expected = float((flow.radii * flow.weights).sum())
        rows.append([f"noisy, T = {scaled}/d", float(predicted[-1]), float(risks[-1]), expected])
        rows[-1] += [float(radii[-1].mean()), float((risks - predicted).abs().max() / predicted[0]) * 100]
        name = f"noisy, T {scaled}/d"
        results[name] = {
            "predicted": predicted.tolist(),
            "measured": risks.tolist(),
            "energy": flow.energy[::STRIDE].tolist(),
        }
        fourth.hist(radii[-1].numpy(), bins=50, density=True, color=f"C{i}", alpha=0.4)
        fourth.plot(
            flow.radii, flow.weights * CELLS / LARGEST, color=f"C{i}", label=f"T = {scaled}/d, t = {DURATION:g}"
        )
        rest = radial_fokker_planck(problem, flow.weights, duration=200.0, steps=200, **options)
        fourth.plot(rest.radii, rest.weights * CELLS / LARGEST, "--", color=f"C{i}", label="Gibbs law")
    titles = ("risk", "radii, delta = 0.8", "noisy SGD", "radii")
    for axis, title in zip((left, second, third, fourth), titles, strict=True):
        axis.set(title=title, xlabel="time" if axis in (left, third) else "r")
        axis.legend(fontsize=7)
    header = ["run", "risk at the end: predicted", "measured", "mean radius: predicted", "measured"]
    header += ["largest deviation of the risk, % of the first"]
    results = {"width": args.width, "dim": args.dim, "rows": rows, **results}
    save(args, "landscape", table(header, rows), results, picture, begun)


if __name__ == "__main__":
    main()
