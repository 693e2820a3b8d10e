"""Prices of moves against moves; a mixed-up network put in order; bad input."""

import copy

import pytest
import torch
from torch import nn

from recipes.theory.deep import Teacher, deep_stack, loss_of, train_
from recipes.theory.flows import swirl
from recipes.theory.order import mixed, places
from torch_meanfield import MeanFieldSequential
from torch_meanfield.theory import (
    cheap_moves,
    exchange_prices,
    move_prices,
    probe_loss,
    recover_order_,
    reorder_,
    trajectory,
)
from torch_meanfield.theory.order import inversions, moved

BATCH = swirl(64, 0)


def inner(out, v):
    return (out * v).sum()


def linear(n):
    torch.manual_seed(0)
    layer = MeanFieldSequential(*(nn.Linear(2, 2) for _ in range(n)), horizon=1.0).double()
    return layer.set_tau_(torch.linspace(0.2, 1, n) ** 2)


def test_under_a_linear_loss_behind_linear_blocks_prices_are_exact():
    layer = linear(4)
    prices = move_prices(trajectory(layer, BATCH, loss=inner))
    before = inner(layer(BATCH[0]), BATCH[1])
    for i in range(4):
        for j in range(4):
            after = inner(reorder_(copy.deepcopy(layer), moved(4, [(i, j)]))(BATCH[0]), BATCH[1])
            assert (after - before).item() == pytest.approx(prices[i, j].item(), rel=1e-9, abs=1e-12)


def test_moves_to_the_next_place_are_exchanges():
    layer, teacher = deep_stack(6, 0), Teacher(0)
    batch = teacher.batch(64)
    where, probes = trajectory(layer, batch), [trajectory(layer, batch, loss=probe_loss(seed=k)) for k in range(2)]
    prices, expected = move_prices(where, probes, reach=1), exchange_prices(where, probes)
    torch.testing.assert_close(prices.diagonal(1), expected)
    torch.testing.assert_close(prices.diagonal(-1), expected)
    assert prices[2, 0] == torch.inf and prices[0, 2] < torch.inf


def test_the_order_of_a_trained_network_is_recovered():
    n, teacher = 8, Teacher(0)
    layer = deep_stack(n, 0)
    train_(layer, teacher, 150, size=64)
    wrong = mixed(layer, "random", 4)
    assert inversions(places(wrong, layer)) == 14
    losses = recover_order_(wrong, lambda: teacher.batch(256), rounds=15, reach=None)
    batch = teacher.batch(1024)
    assert losses[0] > 1.5 * losses[-1]
    assert inversions(places(wrong, layer)) == 0
    assert loss_of(wrong, batch) == pytest.approx(loss_of(layer, batch), rel=1e-12)


def test_orders():
    assert moved(5, [(0, 2), (4, 3)]) == [1, 2, 0, 4, 3]
    prices = torch.tensor([[0.0, -1.0, -3.0], [9.0, 0.0, 9.0], [-2.0, 9.0, 0.0]])
    assert cheap_moves(prices) == [(0, 2)] and cheap_moves(prices, below=-4.0) == []
    layer = linear(3)
    weights, steps = [f.weight.detach().clone() for f in layer], layer.steps().detach()
    reorder_(layer, [2, 0, 1])
    assert all(torch.equal(f.weight, weights[k]) for f, k in zip(layer, (2, 0, 1), strict=True))
    torch.testing.assert_close(layer.steps().detach(), steps[[2, 0, 1]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reorder_(linear(3), [0, 1, 1]), "a permutation of 0 .. 2"),
        (lambda: move_prices(trajectory(linear(3), BATCH), reach=-1), "reach"),
        (lambda: move_prices(trajectory(linear(3), BATCH, substeps=2)), "substeps=1"),
        (lambda: move_prices(trajectory(linear(3), BATCH), [trajectory(linear(2), BATCH)]), "a probe has states"),
        (lambda: recover_order_(linear(3), lambda: BATCH, rounds=-1), "rounds"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
