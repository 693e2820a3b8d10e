#!/usr/bin/env python3
"""Two neighbouring blocks change places: what it costs, what eq. (15) has to climb for it, and the price beforehand.

    python recipes/theory/exchange.py [--blocks 48] [--out runs/theory/exchange]

A residual MLP of 48 blocks with steps of one is trained on a two-layer teacher. Left: the loss along the way of two
neighbours past each other in eq. (15), where a step is the gap to the predecessor; dotted, the exchange itself. Second:
what every exchange costs, measured, against its price by one forward and one adjoint pass, and with four random
adjoint passes more for the curvature. Third: the highest loss on the way over the cost of the exchange, for every pair.
Right: the tau gradient of eq. (15) beside the slope in time that the continuum has. Half a minute on one core.
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

from recipes.theory.deep import Batch, Teacher, deep_stack, loss_of, train_
from recipes.theory.report import arguments, figure, save, table
from torch_meanfield import MeanFieldSequential
from torch_meanfield.theory import exchange_, exchange_prices, probe_loss, time_velocity, trajectory

WAY = (0.0, 0.1, 0.2, 0.3, 0.4, 0.45, 0.4999, 0.5001, 0.55, 0.6, 0.7, 0.8, 0.9, 1.0)


def along(layer: MeanFieldSequential, i: int, batch: Batch) -> list[float]:
    """The loss on the way of blocks i and i + 1 past each other: tau_i rises by s while tau_{i+1} falls by s."""
    tau, losses = layer.tau.detach(), []
    for s in WAY:
        moved, values = copy.deepcopy(layer), tau.clone()
        values[i] += s
        values[i + 1] -= s
        losses.append(loss_of(moved.set_tau_(values), batch))
    return losses


def costs(layer: MeanFieldSequential, batch: Batch) -> Tensor:
    """What each exchange does to the loss, measured; ``(n - 1,)``."""
    before = loss_of(layer, batch)
    after = [loss_of(exchange_(copy.deepcopy(layer), [i]), batch) for i in range(len(layer) - 1)]
    return torch.tensor(after, dtype=torch.float64) - before


def slopes(layer: MeanFieldSequential, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each block but the last: the tau gradient of eq. (15), and the mean slope in time about its end."""
    where = trajectory(layer, batch)
    fine = trajectory(layer, batch, substeps=8)
    ours = [time_velocity(fine, block, tau) for block, tau in zip(layer, layer.tau.tolist(), strict=True)]
    return -where.by_step.diff(), torch.stack(ours)[:-1]


def main() -> None:
    parser = arguments("exchange", __doc__)
    parser.add_argument("--blocks", type=int, default=48)
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    begun = time.perf_counter()
    teacher, layer = Teacher(args.seed), deep_stack(args.blocks, args.seed)
    fresh = costs(layer, teacher.batch(256)).abs().mean().item()
    train_(layer, teacher, args.steps)
    batch = teacher.batch(256)
    before, measured = loss_of(layer, batch), costs(layer, batch)
    where = trajectory(layer, batch)
    probes = [trajectory(layer, batch, loss=probe_loss(seed=k)) for k in range(4)]
    prices = {k: exchange_prices(where, probes[:k]) for k in (0, 1, 4)}
    errors = {k: ((p - measured).norm() / measured.norm()).item() for k, p in prices.items()}
    ways = torch.tensor([along(layer, i, batch) for i in range(args.blocks - 1)], dtype=torch.float64) - before
    half = WAY.index(0.4999)
    peaks = ways[:, : half + 1].amax(1) / measured.abs()
    jumps = (ways[:, half + 1] - ways[:, half]).abs() / measured.abs()
    (old, new) = slopes(layer, batch)

    picture, (left, second, third, right) = figure(4, 4.2)
    for k, i in enumerate((args.blocks // 10, args.blocks // 2, args.blocks - 5)):
        left.plot(WAY, before + ways[i], color=f"C{k}", marker=".", label=f"blocks {i}, {i + 1}")
        left.axhline(before + measured[i].item(), color=f"C{k}", linestyle=":")
    left.set(title="loss along the crossing (dotted: exchanged)", xlabel="way (1/2: the crossing)")
    for k, label, mark in ((0, "one adjoint pass", "x"), (4, "and four for the curvature", "o")):
        second.plot(measured, prices[k], mark, markersize=4, label=f"{label}: off by {100 * errors[k]:.0f} %")
    second.plot(measured, measured, color="k", linewidth=0.8)
    second.set(title="price of each exchange", xlabel="measured change of the loss", ylabel="predicted")
    third.semilogy(peaks, ".", label="highest loss on the way")
    third.semilogy(jumps, ".", label="jump at the crossing")
    third.axhline(1, color="k", linewidth=0.8)
    third.set(title="over the size of the exchange's cost", xlabel="pair")
    scale = before
    right.plot(old / scale, new / scale, ".")
    right.set(title="slope in tau of each block / loss", xlabel="of eq. (15)", ylabel="of the continuum")
    for axis in (left, second, third):
        axis.legend(fontsize=7)
    correlation = torch.corrcoef(torch.stack([old, new]))[0, 1].item()
    rows = [[f"price with {k} curvature passes: error / cost", e] for k, e in errors.items()]
    for name, values in (("highest loss on the way / |cost|", peaks), ("jump at the crossing / |cost|", jumps)):
        rows += [[f"{name}, {q}", getattr(values, q)().item()] for q in ("min", "median", "max")]
    rows += [
        ["loss", before],
        ["mean cost of an exchange, trained", measured.mean().item()],
        ["mean size of it, fresh", fresh],
        ["correlation of the two slopes in tau", correlation],
    ]
    save(args, "exchange", table(["", "value"], rows), {"rows": rows}, picture, begun)


if __name__ == "__main__":
    main()
