"""Fluctuations of networks with two hidden layers: finite networks, central differences, plain SGD, bad input."""

import math

import pytest
import torch
from torch import nn

from recipes.theory.multilayer import DT, X, Y, expectations, limit, of_types, one_by_one, trained
from torch_meanfield.theory.multilayer import Layers, Shares, layer_influences, multilayer_covariance, train_layers


@pytest.fixture(scope="module")
def layers():
    return limit(64)


def test_a_network_is_one_under_sgd():
    """Against autograd and torch.optim.SGD, each weight's rate times what its gradient is divided by."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(5, 2, generator=generator).double(), torch.randn(7, 2, generator=generator).double()
    layers = of_types(first, second)
    weights = [nn.Parameter(t.clone()) for t in layers]
    optimizer = torch.optim.SGD(
        [{"params": [w], "lr": DT * n} for w, n in zip(weights, (5, 35, 7), strict=True)], lr=1.0
    )
    outputs, final = train_layers(layers, X, Y, dt=DT, steps=4)
    for step in range(5):
        hidden = torch.tanh(X @ weights[0].T) @ weights[1] / 5
        f = torch.tanh(hidden) @ weights[2] / 7
        torch.testing.assert_close(outputs[step], f.detach())
        if step < 4:
            optimizer.zero_grad()
            ((f - Y).square().mean() / 2).backward()
            optimizer.step()
    for found, weight in zip(final, weights, strict=True):
        torch.testing.assert_close(found, weight.detach())


def test_shares_are_copies_of_neurons():
    layers = limit(4)
    shares = Shares(torch.tensor([0.5, 0.25, 0.25, 0.0]).double(), torch.tensor([0.2, 0.4, 0.2, 0.2]).double())
    copies = [torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 2, 3])]
    copied = Layers(layers.first[copies[0]], layers.second[copies[0]][:, copies[1]], layers.third[copies[1]])
    torch.testing.assert_close(
        train_layers(copied, X, Y, dt=DT, steps=6)[0], train_layers(layers, X, Y, dt=DT, steps=6, shares=shares)[0]
    )


def test_influences_against_central_differences():
    layers = limit(8)
    equal = Shares(torch.full((8,), 1 / 8).double(), torch.full((8,), 1 / 8).double())
    psi = layer_influences(layers, X, Y, dt=DT, steps=6)
    for which in (0, 1):
        for j in (0, 5):
            ends = []
            for sign in (1, -1):
                moved = [t.clone() for t in equal]
                moved[which] *= 1 - sign * 1e-6  # towards the type j, of sum 1
                moved[which][j] += sign * 1e-6
                ends.append(train_layers(layers, X, Y, dt=DT, steps=6, shares=Shares(*moved))[0][-1])
            torch.testing.assert_close((ends[0] - ends[1]) / 2e-6, psi[which][:, j], rtol=1e-6, atol=1e-9)


def test_at_the_start_in_closed_form(layers):
    """The second layer's influence is the unit; the first's, w2 phi(w1 x) through the slope of the second."""
    one = torch.tanh(layers.first @ X.T)
    hidden = layers.second.T @ one / 64
    second = (layers.third[:, None] * torch.tanh(hidden)).T
    back = layers.third[:, None] * (1 - torch.tanh(hidden).square()) / 64
    first = (one * (layers.second @ back)).T
    centred = [p - p.mean(1, keepdim=True) for p in (first, second)]
    expected = centred[0] @ centred[0].T / 64 + 0.5 * centred[1] @ centred[1].T / 64
    found = multilayer_covariance(layers, X, Y, dt=DT, steps=0, ratio=0.5)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_finite_networks_deviate_as_predicted_and_less_and_less():
    times, networks, n = (0, 15, 60), 1_000, 30
    f = train_layers(limit(512), X, Y, dt=DT, steps=60)[0]
    squares = n * (trained(n, networks, 1, 60) - f[:, None]).square().mean(2)
    predicted = [expectations(t, 0, types=64).mean() for t in times]
    for t, expected in zip(times, predicted, strict=True):
        error = float(squares[t].std()) / math.sqrt(networks)
        assert float(squares[t].mean()) == pytest.approx(float(expected), abs=3.5 * error, rel=0.15)
    assert predicted[2] < predicted[1] / 8 < predicted[0] / 80


def test_single_networks_deviate_as_their_neurons_say(layers):
    measured, expected = one_by_one(1_000, 100, layers, 15, seed=0)
    unexplained = [float((m - e).square().sum() / m.square().sum()) for m, e in ((measured, expected),)]
    assert unexplained[0] < 0.03
    more, said = one_by_one(10_000, 100, layers, 15, seed=0)
    assert float((more - said).square().sum() / more.square().sum()) < 0.5 * unexplained[0]  # of the next order


GOOD = {"layers": limit(4), "x": X, "y": Y, "dt": 0.1, "steps": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": 0.0}, "dt"),
        ({"steps": -1}, "steps"),
        ({"y": torch.ones(2)}, "x must be"),
        ({"layers": Layers(torch.ones(3, 5), torch.ones(3, 4), torch.ones(4))}, r"layers must be \(..., n1, 2\)"),
        ({"shares": Shares(torch.ones(4), torch.ones(3))}, "shares.second must end in 4"),
        ({"activation": nn.Softmax(-1)}, "not element-wise"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        train_layers(**(GOOD | change))


def test_bad_arguments_of_the_covariance():
    with pytest.raises(ValueError, match="ratio must be positive"):
        multilayer_covariance(**GOOD, ratio=0.0)
    many = Layers(*(t.expand(2, *t.shape) for t in GOOD["layers"]))
    with pytest.raises(ValueError, match="of one set of types"):
        layer_influences(**(GOOD | {"layers": many}))
