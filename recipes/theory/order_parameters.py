#!/usr/bin/env python3
"""SGD in high dimension as an ordinary differential equation; the phases over learning rate and width.

    python recipes/theory/order_parameters.py [--dim 1000] [--out runs/theory/order_parameters]

Left: overlaps of a student of four erf units with a teacher of two, one pass of SGD on fresh samples in d = 1,000
    (dots),
and the equations from the same initial overlaps (lines). Middle: the risk at the end, for label noise 0.01, over
learning rate gamma and width p: it is a function of gamma / p alone to a good part, so that widening the student and
slowing it down do the same; for large gamma / p it does not learn. Right: along that axis, the noise floor is
proportional to gamma / p. Four minutes on one core.
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
from torch_meanfield.theory.order_parameters import Overlaps, integrate_sgd, population_risk

P, K = 4, 2
RATE, DURATION = 0.5, 40.0  # gamma / p, and time in units of p d / gamma samples
NOISE = 1e-2
RATES = tuple(2.0**e for e in range(-4, 6))  # gamma
WIDTHS = (2, 4, 8, 16)


def weights(d: int, p: int, seed: int) -> tuple[Tensor, Tensor]:
    """A student that begins near 0.3 of each teacher, unit lengths; orthogonal teachers of length sqrt(d); float64."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.linalg.qr(torch.randn(d, K, generator=generator, dtype=torch.float64))[0].T * math.sqrt(d)
    mixing = 0.3 * torch.randn(p, K, generator=generator, dtype=torch.float64)
    student = mixing @ teacher + 0.5 * torch.randn(p, d, generator=generator, dtype=torch.float64)
    return student, teacher


def simulate(
    student: Tensor, teacher: Tensor, *, rate: float, steps: int, records: int, noise: float = 0.0, seed: int = 0
) -> list[Overlaps]:
    """One-pass SGD with fresh Gaussian samples, one at each step; overlaps at ``records + 1`` times."""
    generator = torch.Generator().manual_seed(seed)
    w, d, slope = student.clone(), student.shape[1], math.sqrt(2 / math.pi)
    found = [Overlaps.of(w, teacher)]
    per_record = steps // records
    for _ in range(records):
        for start in range(0, per_record, 500):
            count = min(500, per_record - start)
            x = torch.randn(count, d, generator=generator, dtype=w.dtype) / math.sqrt(d)
            y = torch.erf(x @ teacher.T / math.sqrt(2)).mean(1)
            y += math.sqrt(noise) * torch.randn(count, generator=generator, dtype=w.dtype)
            for sample, label in zip(x, y.tolist(), strict=True):
                field = w @ sample
                error = label - torch.erf(field / math.sqrt(2)).mean()
                # the gradient carries 1 / p, and gamma = rate * p
                w.addr_(torch.exp(-field.square() / 2) * error, sample, alpha=rate * slope)
        found.append(Overlaps.of(w, teacher))
    return found


def deviations(
    d: int, p: int, rate: float, duration: float, records: int, seed: int
) -> tuple[list[Overlaps], Overlaps, float]:
    """A simulation, the equations from its initial overlaps, and the largest difference over the largest overlap."""
    student, teacher = weights(d, p, seed)
    measured = simulate(student, teacher, rate=rate, steps=int(duration * d / rate), records=records, seed=seed)
    per_record = 20
    path = integrate_sgd(measured[0], rate=rate, duration=duration, steps=records * per_record)
    predicted = Overlaps(path.q[::per_record], path.m[::per_record], path.t[::per_record])
    q, m = torch.stack([o.q for o in measured]), torch.stack([o.m for o in measured])
    scale = max(predicted.q.abs().max(), predicted.m.abs().max())
    worst = max((q - predicted.q).abs().max(), (m - predicted.m).abs().max()) / scale
    return measured, predicted, float(worst)


def final_risk(gamma: float, p: int, duration: float = 100.0) -> float:
    """The risk after ``duration``, by the equations; infinite if they have no bounded solution."""
    student, teacher = weights(1000, p, seed=1)
    rate = gamma / p
    steps = int(duration * min(16.0, max(4.0, 4 * rate)))
    try:
        path = integrate_sgd(Overlaps.of(student, teacher), rate=rate, duration=duration, steps=steps, noise=NOISE)
    except RuntimeError:
        return math.inf
    return float(population_risk(Overlaps(path.q[-1], path.m[-1], path.t[-1])))


def main() -> None:
    parser = arguments("order_parameters", __doc__)
    parser.add_argument("--dim", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    begun = time.perf_counter()
    torch.set_num_threads(1)  # vectors of a thousand numbers: a second thread only waits
    picture, (left, middle, right) = figure(3)
    records, errors = 40, []
    for seed in range(args.seed, args.seed + args.seeds):
        measured, predicted, worst = deviations(args.dim, P, RATE, DURATION, records, seed)
        errors.append(worst)
        if seed == args.seed:
            times = DURATION * torch.arange(records + 1) / records
            for j in range(P):
                for r in range(K):
                    left.plot(times, [o.m[j, r] for o in measured], ".", color=f"C{j}", markersize=4)
                    left.plot(times, predicted.m[:, j, r], color=f"C{j}", linewidth=0.8, linestyle="-" if r else "--")
                left.plot(times, [o.q[j, j] for o in measured], "x", color=f"C{j}", markersize=3)
                left.plot(times, predicted.q[:, j, j], color=f"C{j}", linewidth=1.6)
    left.set(title=f"overlaps, d = {args.dim:,}: SGD and equations", xlabel=r"time $\gamma\nu / (pd)$")
    risks = torch.tensor([[final_risk(gamma, p) for gamma in RATES] for p in WIDTHS], dtype=torch.float64)
    shown = middle.imshow(risks.clamp(1e-7, 1).log10(), origin="lower", aspect="auto", cmap="viridis")
    picture.colorbar(shown, ax=middle, label="log10 risk")
    middle.set(title=f"risk at the end, noise {NOISE}", xlabel=r"$\gamma$", ylabel="width p")
    middle.set_xticks(range(len(RATES)), [f"{g:g}" for g in RATES], fontsize=7)
    middle.set_yticks(range(len(WIDTHS)), [str(p) for p in WIDTHS])
    middle.grid(False)
    for i, p in enumerate(WIDTHS):
        right.loglog([g / p for g in RATES], risks[i], "o-", markersize=3, label=f"p = {p}")
    right.set(title="the same against $\\gamma / p$", xlabel=r"$\gamma / p$", ylabel="risk")
    right.legend(fontsize=7)
    text = table(
        ["seed", f"largest deviation of an overlap, d = {args.dim:,}, %"], [[i, 100 * e] for i, e in enumerate(errors)]
    )
    text += "\n" + table(
        ["p", *[f"gamma = {g:g}" for g in RATES]], [[p, *row] for p, row in zip(WIDTHS, risks.tolist(), strict=True)]
    )
    results = {"deviations": errors, "rates": RATES, "widths": WIDTHS, "risks": risks.tolist()}
    save(args, "order_parameters", text, results, picture, begun)


if __name__ == "__main__":
    main()
