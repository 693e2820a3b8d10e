#!/usr/bin/env python3
"""The functional gradient of a stack of residual blocks: where a new block would pay, and whether it does.

    python recipes/theory/continuum.py [--seeds 5] [--out runs/theory/continuum]

Six branches of four tanh units learn to carry the plane along a swirl. Left: E<p_t, f(X_t, theta)> of one-unit blocks
a tanh(<w, x>), w on a circle, a of length one and the best direction, over the direction of w and the time. Middle:
300 random blocks at random places, the change of the loss by their birth with a small step, predicted and measured.
Right: the change by the block that is most negative among all candidates, by one that has been moved down the
functional gradient, and by a random one (with the sign that helps), all of the same norm. Half a minute on one core.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from recipes.theory.flows import Branch, stack, swirl, train_
from recipes.theory.report import arguments, figure, save, table
from torch_meanfield import MeanFieldSequential
from torch_meanfield.theory.continuum import StreamTrajectory, half_squared, trajectory

N, HIDDEN, SAMPLES, STEP, CANDIDATES = 6, 4, 256, 0.001, 100
Batch = tuple[Tensor, Tensor]


def born(layer: MeanFieldSequential, theta: Branch, t: float, step: float) -> MeanFieldSequential:
    """The stack with one more block behind time t, those after it that much later."""
    tau = layer.tau.detach()
    behind = tau > t + 1e-9
    made = MeanFieldSequential(*copy.deepcopy(list(layer)), copy.deepcopy(theta))
    made.set_tau_(torch.cat([tau + step * behind, torch.tensor([t + step], dtype=tau.dtype)]))
    return made


@torch.no_grad()
def loss_of(layer: MeanFieldSequential, batch: Batch) -> float:
    """Half the mean squared distance."""
    return half_squared(layer(batch[0]), batch[1]).item()


@torch.no_grad()
def to_norm_(theta: Branch, x: Tensor) -> Branch:
    """Scale what a block puts out to a mean square of one on ``x``."""
    theta.v.div_(theta(x).square().sum(1).mean().sqrt())
    return theta


def candidates(count: int, x: Tensor, seed: int) -> list[Branch]:
    """Random blocks of norm one on ``x``."""
    generator = torch.Generator().manual_seed(seed)
    return [to_norm_(Branch(2, HIDDEN, generator), x) for _ in range(count)]


def descended(theta: Branch, where: StreamTrajectory, t: float, steps: int = 100) -> Branch:
    """The best block on a way down the functional gradient at time t, its norm kept."""
    theta = copy.deepcopy(theta)
    state = where.states[where.cells(t)[0][0]]
    optimizer, seen = torch.optim.Adam(theta.parameters(), lr=0.02), []
    for _ in range(steps):
        value = where.gradient(theta, t)
        seen.append((value.item(), copy.deepcopy(theta.state_dict())))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        to_norm_(theta, state)
    theta.load_state_dict(min(seen, key=lambda each: each[0])[1])
    return theta


def births(seed: int, batch: Batch) -> dict[str, list[float]]:
    """By way of birth: predicted change of the loss, measured, and the loss after 200 more steps of Adam."""
    layer = stack(N, HIDDEN, horizon=1.0, seed=seed)
    train_(layer, batch, 150)
    where = trajectory(layer, batch)
    nodes, blocks = where.times.tolist(), candidates(CANDIDATES, where.states[0], seed + 100)
    scored = []
    for theta in blocks:
        for t in nodes:
            to_norm_(theta, where.states[where.cells(t)[0][0]])
            scored.append((where.gradient(theta, t).item(), copy.deepcopy(theta), t))
    _, best, at = min(scored, key=lambda each: each[0])
    value, drawn, anywhere = scored[len(scored) // 2 + seed]
    if value > 0:
        with torch.no_grad():
            drawn.v.neg_()
    before, found = loss_of(layer, batch), {}
    for name, theta, t in (
        ("random", drawn, anywhere),
        ("most negative", best, at),
        ("moved down", descended(best, where, at), at),
    ):
        grown = born(layer, theta, t, STEP)
        change = loss_of(grown, batch) - before
        predicted = STEP * where.gradient(theta, t).item()
        found[name] = [predicted / before, change / before, train_(grown, batch, 200) / before]
    return found


def by_direction(where: StreamTrajectory, angles: Tensor, times: Tensor) -> Tensor:
    """The most negative functional gradient over a of length one of a tanh(2 <w, x>); ``(angles, times)``."""
    w = 2 * torch.stack([angles.cos(), angles.sin()])
    units = [(where.states[s], where.adjoints[p]) for s, p, _ in (where.cells(t)[0] for t in times.tolist())]
    return torch.stack([-(torch.tanh(x @ w).T @ p).norm(dim=1) for x, p in units], 1)


def main() -> None:
    parser = arguments("continuum", __doc__)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    begun = time.perf_counter()
    batch = swirl(SAMPLES, args.seed)
    layer = stack(N, HIDDEN, horizon=1.0, seed=args.seed)
    train_(layer, batch, 150)
    where = trajectory(layer, batch, substeps=16)
    angles, times = torch.linspace(0, math.pi, 91).double(), torch.linspace(0, where.times[-1].item(), 120).double()
    seen = by_direction(where, angles, times)
    coarse, before = trajectory(layer, batch), loss_of(layer, batch)
    generator, pairs = torch.Generator().manual_seed(args.seed), []
    for theta in candidates(300, coarse.states[0], args.seed):
        t = coarse.times[int(torch.randint(N + 1, (), generator=generator))].item()
        pairs.append((STEP * coarse.gradient(theta, t).item(), loss_of(born(layer, theta, t, STEP), batch) - before))
    predicted, measured = torch.tensor(pairs, dtype=torch.float64).T
    error = ((measured - predicted).norm() / measured.norm()).item()
    found = {args.seed + k: births(args.seed + k, batch) for k in range(args.seeds)}

    picture, (left, middle, right) = figure(3)
    shown = left.pcolormesh(times, angles * 180 / math.pi, seen, shading="nearest")
    picture.colorbar(shown, ax=left)
    for node in layer.tau.tolist():
        left.axvline(node, color="white", linewidth=0.5)
    left.set(title="functional gradient of a tanh(2 <w, x>)", xlabel="t (white: tau)", ylabel="direction of w, degrees")
    middle.plot(predicted, measured, ".", markersize=4)
    middle.plot(predicted, predicted, color="k", linewidth=0.8)
    middle.set(title=f"births with step {STEP}", xlabel="predicted change of the loss", ylabel="measured")
    for k, name in enumerate(next(iter(found.values()))):
        rows = [(-each[name][0], -each[name][1]) for each in found.values()]
        right.plot([k + 0.1] * len(rows), [100 * a for a, _ in rows], "_", color=f"C{k}", markersize=14)
        right.plot([k - 0.1] * len(rows), [100 * b for _, b in rows], "o", color=f"C{k}", label=name)
    right.set(title="drop of the loss, % (bars: predicted)", xticks=[])
    right.legend(fontsize=7)
    header = ["seed", "block", "predicted change of the loss / loss", "measured", "after 200 steps more"]
    text = table(header, [[seed, name, *row] for seed, each in found.items() for name, row in each.items()])
    text += f"\n300 random births: measured and predicted changes of the loss differ by {100 * error:.2f} % (L2).\n"
    save(args, "continuum", text, {"births": found, "error": error}, picture, begun)


if __name__ == "__main__":
    main()
