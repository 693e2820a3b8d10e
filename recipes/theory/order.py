#!/usr/bin/env python3
"""A residual network falls, its blocks are mixed up: the order found again by the price of each move.

    python recipes/theory/order.py [--blocks 48] [--rounds 80] [--out runs/theory/order]

A residual MLP of 48 blocks with steps of one is trained on a two-layer teacher. Its blocks are then put in a wrong
order: displaced by about four places, sorted by the norm of their output weights, or at random. From each of them,
rounds of exchanges of neighbours (their first-order price; with the curvature) and of moves over any distance, on fresh
batches of 256. Left: inversions over the rounds. Right: the loss. A minute on one core.
"""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from recipes.theory.deep import Teacher, deep_stack, loss_of, train_
from recipes.theory.exchange import costs
from recipes.theory.report import arguments, figure, save, table
from torch_meanfield import MeanFieldSequential
from torch_meanfield.theory import cheap_pairs, exchange_, exchange_prices, probe_loss, trajectory
from torch_meanfield.theory.order import PATIENCE, inversions, recover_order_, reorder_


def mixed(layer: MeanFieldSequential, how: str, seed: int) -> MeanFieldSequential:
    """A copy in a wrong order; its branches are labelled by the places they had, ``branch.place``."""
    copied = copy.deepcopy(layer)
    n, generator = len(copied), torch.Generator().manual_seed(seed)
    if how == "displaced":
        key = torch.arange(n) + 4 * torch.randn(n, generator=generator)
    elif how == "by norm":
        key = torch.tensor([branch.v.norm().item() for branch in copied])  # type: ignore[union-attr,operator]
    else:
        key = torch.rand(n, generator=generator)
    return reorder_(copied, key.argsort().tolist())


def places(layer: MeanFieldSequential, original: MeanFieldSequential) -> list[int]:
    """The place that each block had in ``original``, known by its weights."""
    known = {tuple(branch.b.tolist()): i for i, branch in enumerate(original)}  # type: ignore[union-attr,operator]
    return [known[tuple(branch.b.tolist())] for branch in layer]  # type: ignore[union-attr,operator]


def neighbours_(layer: MeanFieldSequential, teacher: Teacher, size: int, probes: int, seed: int) -> float:
    """One round of exchanges of negative price; the loss before it."""
    batch = teacher.batch(size)
    where = trajectory(layer, batch)
    seen = [trajectory(layer, batch, loss=probe_loss(seed=seed * probes + k)) for k in range(probes)]
    exchange_(layer, cheap_pairs(exchange_prices(where, seen)))
    return where.loss


def recovered(
    layer: MeanFieldSequential, original: MeanFieldSequential, teacher: Teacher, how: str, rounds: int
) -> tuple[list[int], list[float]]:
    """Inversions after every round, and losses before it; three rounds that change nothing end it."""
    orders, losses = [places(layer, original)], []
    for r in range(rounds):
        if how == "moves":  # one round at a time, to count between
            losses += recover_order_(
                layer, lambda: teacher.batch(256), rounds=1, probe=lambda k, r=r: probe_loss(seed=r)
            )
        else:
            losses.append(neighbours_(layer, teacher, 256, int(how == "exchanges, curvature"), r))
        orders.append(places(layer, original))
        if len(orders) > PATIENCE and all(order == orders[-1] for order in orders[-PATIENCE - 1 :]):
            break
    return [inversions(order) for order in orders], losses


def main() -> None:
    parser = arguments("order", __doc__)
    parser.add_argument("--blocks", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=80, help="of moves; half as many of exchanges")
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    begun = time.perf_counter()
    teacher, layer = Teacher(args.seed), deep_stack(args.blocks, args.seed)
    train_(layer, teacher, args.steps)
    test = teacher.batch(2048)
    rows, runs = [], {}
    for start in ("displaced", "by norm", "random"):
        batch, wrong = teacher.batch(256), mixed(layer, start, args.seed + 1)
        measured, price = costs(wrong, batch), exchange_prices(trajectory(wrong, batch))
        error = ((price - measured).norm() / measured.norm()).item()
        for how in ("exchanges", "exchanges, curvature", "moves"):
            found, clock = copy.deepcopy(wrong), time.process_time()
            rounds = args.rounds if how == "moves" else args.rounds // 2
            counts, losses = recovered(found, layer, teacher, how, rounds)
            seconds = time.process_time() - clock
            runs[f"{start}: {how}"] = {"inversions": counts, "losses": losses, "price_error": error}
            rows.append(
                [start, how, counts[0], counts[-1], min(counts), loss_of(wrong, test), loss_of(found, test), seconds]
            )

    picture, (left, right) = figure(2, 5.2, 4.0)
    for k, (name, run) in enumerate(runs.items()):
        style = ("-", "--", ":")[k // 3]
        left.plot(run["inversions"], style, color=f"C{k % 3}", label=name)
        right.semilogy(run["losses"], style, color=f"C{k % 3}")
    right.axhline(loss_of(layer, test), color="k", linewidth=0.8)
    left.set(title="inversions", xlabel="round", yscale="symlog")
    right.set(title="loss on a fresh batch (black: in order)", xlabel="round")
    left.legend(fontsize=7)
    header = ["start", "priced", "inversions", "after", "least", "test loss", "after", "processor seconds"]
    text = table(header, rows) + f"\nTest loss in the trained order: {loss_of(layer, test):.4f}. "
    errors = {name.split(":")[0]: run["price_error"] for name, run in runs.items()}
    text += "Error of the first-order price: " + ", ".join(f"{k} {100 * v:.0f} %" for k, v in errors.items()) + ".\n"
    save(args, "order", text, {"rows": rows, "runs": runs}, picture, begun)


if __name__ == "__main__":
    main()
