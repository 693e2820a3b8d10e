"""Prices of exchanges against exchanges, in closed form and measured; the exchange itself; bad input."""

import copy

import pytest
import torch
from torch import nn

from recipes.theory.deep import Teacher, deep_stack, loss_of, train_
from recipes.theory.exchange import costs
from recipes.theory.flows import stack, swirl
from torch_meanfield import MeanFieldSequential
from torch_meanfield.theory import cheap_pairs, exchange_, exchange_prices, probe_loss, time_velocity, trajectory

BATCH = swirl(64, 0)


@pytest.fixture(scope="module")
def trained():
    layer, teacher = deep_stack(8, 0), Teacher(0)
    train_(layer, teacher, 100, size=64)
    return layer, teacher.batch(256)


def linear(n, horizon, bias=True):
    torch.manual_seed(0)
    layer = MeanFieldSequential(*(nn.Linear(2, 2, bias=bias) for _ in range(n)), horizon=horizon)
    return layer.double().set_tau_(horizon * torch.linspace(0.2, 1, n) ** 2)


def test_linear_blocks_cost_their_commutator():
    """x (1 + h A)(1 + k B) against the other order: h k x (BA - AB), behind a loss that is linear."""
    layer = linear(2, 1.0, bias=False)
    a, b = (f.weight.detach().T for f in layer)
    h, k = layer.steps().tolist()
    x, v = BATCH
    price = exchange_prices(trajectory(layer, (x, v), loss=lambda out, v: (out * v).sum()))
    assert price.item() == pytest.approx((h * k * (x @ (b @ a - a @ b)) * v).sum().item(), rel=1e-10)


def test_under_a_linear_loss_behind_linear_blocks_prices_are_exact():
    layer = linear(5, 1.0)

    def loss(out, v):
        return (out * v).sum()

    prices = exchange_prices(trajectory(layer, BATCH, loss=loss))
    for i in range(4):
        after = loss(exchange_(copy.deepcopy(layer), [i])(BATCH[0]), BATCH[1])
        assert (after - loss(layer(BATCH[0]), BATCH[1])).item() == pytest.approx(prices[i].item(), rel=1e-9, abs=1e-12)


def test_the_price_is_the_bracket_for_short_steps():
    """To lowest order it is h k d/dt <p, f_B>, where A acts."""
    layer = stack(2, 3, horizon=1e-4, seed=1)
    where = trajectory(layer, BATCH)
    h, k = layer.steps().tolist()
    slope = time_velocity(where, layer[1], layer.tau[0].item() / 2).item()
    assert exchange_prices(where).item() == pytest.approx(-h * k * slope, rel=1e-3)


def test_prices_with_curvature_are_what_exchanges_cost_in_a_trained_network(trained):
    layer, batch = trained
    measured, where = costs(layer, batch), trajectory(layer, batch)
    probes = [trajectory(layer, batch, loss=probe_loss(seed=k)) for k in range(8)]
    errors = [((exchange_prices(where, probes[:k]) - measured).norm() / measured.norm()).item() for k in (0, 8)]
    assert errors[1] < 0.15 < errors[0]


def test_probes_have_the_hessian_of_cross_entropy_as_covariance():
    z = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)).double().repeat(50_000, 1).requires_grad_()
    (v,) = torch.autograd.grad(probe_loss("cross_entropy")(z, z), z)
    p = z.detach().softmax(1)[0]
    torch.testing.assert_close(v.T @ v / len(v), p.diag() - p[:, None] * p, atol=0.01, rtol=0)


def test_an_exchange_moves_all_a_block_has_with_its_step():
    layer = linear(4, 1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3, momentum=0.9)
    (layer(BATCH[0]) - BATCH[1]).square().mean().backward()
    optimizer.step()
    weights, steps = [f.weight.detach().clone() for f in layer], layer.steps().detach()
    state = [optimizer.state[f.weight]["momentum_buffer"].clone() for f in layer]
    exchange_(layer, [2, 0])
    for i, j in enumerate((1, 0, 3, 2)):
        assert torch.equal(layer[i].weight, weights[j])
        assert torch.equal(optimizer.state[layer[i].weight]["momentum_buffer"], state[j])
    torch.testing.assert_close(layer.steps().detach(), steps[[1, 0, 3, 2]])


def test_twice_is_not_at_all_at_unit_steps(trained):
    layer, batch = copy.deepcopy(trained[0]), trained[1]
    before = loss_of(layer, batch)
    exchange_(layer, [3])
    assert layer.steps().tolist() == [1.0] * 8 and loss_of(layer, batch) != before
    assert loss_of(exchange_(layer, [3]), batch) == before


def test_pairs_do_not_overlap():
    assert cheap_pairs(torch.tensor([-1.0, -3.0, -2.0, 0.0, -0.5])) == [1, 4]
    assert cheap_pairs(torch.tensor([-1.0, -3.0, -2.0, 0.0, -0.5]), below=-0.5) == [1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exchange_(linear(3, 1.0), [2]), "has the pairs 0 .. 1"),
        (lambda: exchange_(linear(3, 1.0), [0, 1]), "share a block"),
        (lambda: exchange_prices(trajectory(linear(3, 1.0), BATCH, substeps=2)), "substeps=1"),
        (
            lambda: exchange_prices(trajectory(linear(3, 1.0), BATCH), [trajectory(linear(2, 1.0), BATCH)]),
            "a probe has states",
        ),
        (lambda: probe_loss("hinge"), "kind must be"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
