r"""The order of a stack's blocks, found again by moves that are priced before they are made.

An exchange of neighbours mends a stack that is nearly in order. In one that is not, the way to a lower loss leads over
many exchanges that each raise it, and what helps is to price whole moves: a block that leaves its place for any other.
Source: the functional gradient of Lu et al. 2020, (10); the pricing is of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from torch_meanfield.depth import MeanFieldSequential
from torch_meanfield.observe import undisturbed
from torch_meanfield.theory.continuum import Loss, StreamTrajectory, applied, half_squared, trajectory
from torch_meanfield.theory.exchange import probe_loss

Batch = tuple[Tensor, Tensor]
Move = tuple[int, int]
PATIENCE = 3  # rounds without a move


def move_prices(
    where: StreamTrajectory, probes: Sequence[StreamTrajectory] = (), *, reach: int | None = None
) -> Tensor:
    r"""What it would do to the loss if the block at place i went to place j, those between moving up.

    As :func:`.exchange_prices`, which are the entries beside the diagonal: :math:`E\langle p, \delta\rangle` and, by
    each probe, half the mean of :math:`\langle q, \delta\rangle^2`; delta is the difference of the states behind the
    blocks that change places. All moves to later places take n^2 / 2 runs of a block, those to earlier ones up to
    n^3 / 6, for which ``reach`` sets a limit.

    Args:
        where, probes: See :func:`.exchange_prices`.
        reach: How many places a block may go to the front; ``None``: any number.

    Returns:
        ``(n, n)``, from i to j, 0 on the diagonal, infinite beyond reach.

    Raises:
        ValueError: A trajectory with substeps, a probe of another stack or batch, a negative reach.
    """
    if len({id(b) for b in where.blocks}) < len(where.blocks):
        raise ValueError("prices are of whole blocks: make the trajectory with substeps=1")
    for probe in probes:
        if probe.states.shape != where.states.shape:
            raise ValueError(f"a probe has states {tuple(probe.states.shape)}, expected {tuple(where.states.shape)}")
    n = len(where.blocks)
    if reach is not None and (isinstance(reach, bool) or not isinstance(reach, int) or reach < 0):
        raise ValueError(f"reach must be an integer of at least 0, or None, got {reach!r}")
    prices = where.states.new_full((n, n), torch.inf).fill_diagonal_(0)
    steps = where.times.diff().to(where.states)

    def price(place: int, state: Tensor) -> Tensor:
        """Of a changed state behind the block at ``place``."""
        delta = state - where.states[place + 1]
        value = (where.adjoints[place + 1] * delta).sum()
        for q in probes:
            value = value + (q.adjoints[place + 1] * delta).flatten(1).sum(1).square().mean() / (2 * len(probes))
        return value

    def step(k: int, x: Tensor) -> Tensor:
        return x + steps[k] * applied(where.blocks[k], x)

    with torch.no_grad(), undisturbed():
        for i in range(n):
            x = where.states[i]
            for j in range(i + 1, n):  # without block i, which comes behind block j
                x = step(j, x)
                prices[i, j] = price(j, step(i, x))
            for j in range(max(0, i - (n if reach is None else reach)), i):  # block i before block j
                x = step(i, where.states[j])
                for k in range(j, i):
                    x = step(k, x)
                prices[i, j] = price(i, x)
    return prices


def cheap_moves(prices: Tensor, below: float = 0.0) -> list[Move]:
    """Moves (i, j) to make at once: the cheapest first, none whose places overlap with those of one chosen before.

    Args:
        prices: ``(n, n)``, from :func:`move_prices`.
        below: Moves at this price or above are left.
    """
    candidates = (prices < below).nonzero().tolist()
    candidates.sort(key=lambda move: prices[move[0], move[1]].item())
    taken: set[int] = set()
    chosen = []
    for i, j in candidates:
        places = range(min(i, j), max(i, j) + 1)
        if taken.isdisjoint(places):
            taken.update(places)
            chosen.append((i, j))
    return chosen


def moved(n: int, moves: Sequence[Move]) -> list[int]:
    """The order after moves that do not overlap: which block, of n by their places before, is at each place."""
    order = list(range(n))
    for i, j in moves:
        order.insert(j, order.pop(i))
    return order


@torch.no_grad()
def reorder_(layer: MeanFieldSequential, order: Sequence[int]) -> MeanFieldSequential:
    """Let the block at place ``order[k]`` come to place k, each with its step size.

    Raises:
        ValueError: ``order`` is no permutation of the places. Nothing has changed then.
    """
    if sorted(order) != list(range(len(layer))):
        raise ValueError(f"order must be a permutation of 0 .. {len(layer) - 1}, got {list(order)}")
    places = torch.tensor(order)
    ends = layer.steps().detach()[places.to(layer.tau.device)].cumsum(0)
    layer.set_tau_(torch.empty_like(ends).scatter_(0, places.to(ends.device), ends))
    return layer


def recover_order_(
    layer: MeanFieldSequential,
    draw: Callable[[], Batch],
    *,
    rounds: int,
    loss: Loss = half_squared,
    probe: Callable[[int], Loss] = lambda seed: probe_loss(seed=seed),
    probes: int = 1,
    reach: int | None = 16,
) -> list[float]:
    """Bring the blocks into an order of lower loss by the cheapest moves, on fresh batches.

    A round prices all moves on one batch, and makes those that do not overlap if that lowers the loss on another one;
    if not, the dearer half of them is left out, and so on down to none. The order is all that changes.

    Args:
        layer: The stack.
        draw: Gives a batch (input of the stack, target); called twice each round.
        rounds: At most; it ends after three in a row without a move.
        loss: See :func:`.trajectory`.
        probe: Makes the loss of a probe from a seed, see :func:`.probe_loss`.
        probes: Adjoint passes for the curvature, each round.
        reach: See :func:`move_prices`.

    Returns:
        The loss before each round, on the batch that moves are priced on.

    Raises:
        ValueError: Numbers out of range. Errors of :func:`.trajectory`.
    """
    for name, value in (("rounds", rounds), ("probes", probes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
    losses: list[float] = []
    idle, n = 0, len(layer)
    for r in range(rounds):
        if idle == PATIENCE:
            break
        batch, other = draw(), draw()
        where = trajectory(layer, batch, loss=loss)
        seen = [trajectory(layer, batch, loss=probe(r * probes + k)) for k in range(probes)]
        losses.append(where.loss)
        moves = cheap_moves(move_prices(where, seen, reach=reach))
        before = _loss_of(where, range(n), other, loss)
        while moves and _loss_of(where, moved(n, moves), other, loss) >= before:
            moves = moves[: len(moves) // 2]
        idle = 0 if moves else idle + 1
        if moves:
            reorder_(layer, moved(n, moves))
    return losses


def inversions(labels: Sequence[int]) -> int:
    """Pairs that stand in the wrong order; 0 if ``labels`` ascend, n (n - 1) / 2 if they descend.

    Example:
        >>> inversions([0, 2, 1, 3]), inversions([3, 2, 1, 0])
        (1, 6)
    """
    if all(a <= b for a, b in pairwise(labels)):
        return 0
    return sum(labels[i] > labels[j] for i in range(len(labels)) for j in range(i + 1, len(labels)))


@torch.no_grad()
def _loss_of(where: StreamTrajectory, order: Sequence[int], batch: Batch, loss: Loss) -> float:
    steps, x = where.times.diff().to(where.states), batch[0]
    with undisturbed():
        for k in order:
            x = x + steps[k] * where.blocks[k](x)
        return loss(x, batch[1]).item()
