"""``Neurons`` and ``neurons_from``: roles, and errors that name what is wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from torch_meanfield.particles import Slice, Stack, transport_
from torch_meanfield.particles.neurons import Neurons, neurons_from


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def columns(net: nn.Sequential) -> tuple[list[Slice], list[str]]:
    slices = [Slice(net[0].weight, 0), Slice(net[0].bias, 0), Slice(net[1].weight, 0), Slice(net[1].bias, 0)]
    return [*slices, Slice(net[2].weight, 1)], ["in", "in", "own", "own", "out"]


def test_columns_by_role() -> None:
    net = mlp()
    hidden = Neurons(*columns(net), owner=net, name="hidden")
    assert hidden.size == 8
    assert [c.tensor is t for c, t in zip(hidden.incoming, net[0].parameters(), strict=True)] == [True, True]
    assert [c.tensor is t for c, t in zip(hidden.own, net[1].parameters(), strict=True)] == [True, True]
    assert [c.tensor is net[2].weight for c in hidden.outgoing] == [True]


def test_within_a_copy_keeps_roles() -> None:
    net = mlp()
    twin = copy.deepcopy(net)
    moved = Neurons(*columns(net), owner=net, name="hidden").within(twin)
    assert isinstance(moved, Neurons)
    assert moved.roles == ("in", "in", "own", "own", "out")
    assert moved.owner is twin and moved.outgoing[0].tensor is twin[2].weight


def test_declared_list_the_last_is_outgoing() -> None:
    z, c = torch.randn(50, 3), torch.zeros(50)
    assert neurons_from([(z, 0), (c, 0)]).roles == ("in", "out")
    assert neurons_from([(z, 0), Slice(c, 0)], "units").name == "units"
    assert neurons_from([(z.T, -1), (c, 0)]).size == 50


def test_a_declared_population_can_be_moved() -> None:
    z, c = torch.arange(6.0).view(3, 2), torch.arange(3.0)
    transport_(neurons_from([(z, 0), (c, 0)]), [2, 2, 0])
    assert c.tolist() == [2, 2, 0] and z[:, 0].tolist() == [4, 4, 0]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda n: neurons_from(n[0].weight), TypeError, "list of"),
        (lambda n: neurons_from([(n[0].weight, 0)]), ValueError, "1 slices given"),
        (lambda n: neurons_from([(n[0].weight, 0), (n[2].weight, 0)]), ValueError, r"\[8, 2\] units"),
        (lambda n: neurons_from([(n[0].weight, 2), (n[2].weight, 1)]), ValueError, "slice 0: .*dim 2 is out of range"),
        (lambda n: neurons_from([(n[0].weight, 0), ("w", 1)]), TypeError, "slice 1: expected a tensor, got str"),
        (lambda n: neurons_from([(n[0].weight, 0), (n[2].weight, 1.0)]), TypeError, "dim must be an integer"),
        (lambda n: neurons_from([(n[0].weight, 0), (n[2].weight, True)]), TypeError, "dim must be an integer"),
        (lambda n: neurons_from([(n[0].weight, 0), n[2].weight]), TypeError, "slice 1 must be"),
        (lambda n: neurons_from([(torch.ones(1, 3), 0), (torch.ones(2, 1), 1)]), ValueError, "1 unit"),
        (lambda n: neurons_from([(n[0].weight, 0), (n[0].weight, 0)]), ValueError, "already"),
        (lambda n: Neurons([Slice(n[0].weight, 0)], ["in"], name="p"), ValueError, "p: no column has the role 'out'"),
        (lambda n: Neurons([Slice(n[0].weight, 0)], ["in", "out"]), ValueError, "1 columns but 2 roles"),
        (lambda n: Neurons([Slice(n[0].weight, 0)], ["outgoing"]), ValueError, "must be one of"),
        (lambda n: Neurons([Stack([torch.ones(1)] * 2)], ["out"]), TypeError, "column 0 must be a Slice"),
        (lambda n: Neurons([], []), ValueError, "columns is empty"),
    ],
)
def test_bad_input_is_named(make: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make(mlp())  # type: ignore[operator]
