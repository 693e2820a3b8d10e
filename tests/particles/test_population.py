import pytest
import torch
from torch import nn

from torch_meanfield import Population, Slice, Stack

_T = torch.zeros(4)


def test_sizes_and_views():
    weight = torch.arange(24.0).view(12, 2)
    column = Slice(weight, 0, outer=2, inner=3)  # rows: twice two particles of three rows each
    assert column.size == 2
    assert column.by_particle(weight).shape == (2, 2, 3, 2)
    assert column.by_particle(weight)[1, 0].flatten().tolist() == list(map(float, range(12, 18)))
    assert Slice(weight, -1).dim == 1
    assert Population([column, Stack([torch.zeros(3), torch.zeros(3)])]).size == 2


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: Stack([]), "one tensor for each particle"),
        (lambda: Stack([torch.zeros(2), torch.zeros(3)]), r"tensors\[1\] is \(3,\)"),
        (lambda: Stack([torch.zeros(2), torch.zeros(2).double()]), "float64"),
        (lambda: Slice(torch.zeros(4, 2), 2), "dim 2 is out of range"),
        (lambda: Slice(torch.zeros(()), 0), "out of range"),
        (lambda: Slice(torch.zeros(4, 2), 0, inner=3), "length 4"),
        (lambda: Population([Slice(_T), Slice(_T)]), "column 1 holds a tensor .*move twice"),
        (lambda: Population([Stack([_T, _T])]), "column 0 holds a tensor"),
        (lambda: Population([]), "at least one tensor"),
        (lambda: Population([Slice(torch.zeros(4)), Slice(torch.zeros(3))], name="mlp"), "mlp: column 1 holds 3"),
    ],
)
def test_bad_input_is_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_within_finds_the_same_tensors_in_a_copy():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    twin = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    population = Population([Slice(model[0].weight), Slice(model[2].weight, 1)], owner=model, name="mlp")
    found = population.within(twin)
    assert found.columns[0].tensor is twin[0].weight and found.columns[1].tensor is twin[2].weight
    assert found.columns[1].dim == 1 and found.owner is twin
    with pytest.raises(ValueError, match=r"no tensor '2.weight'"):
        population.within(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match="without an owner"):
        Population(population.columns).within(twin)


def test_within_keeps_the_layout_and_the_name():
    model, twin = nn.Linear(2, 12), nn.Linear(2, 12)
    found = Population([Slice(model.weight, 0, outer=2, inner=3)], owner=model, name="heads").within(twin)
    (column,) = found.columns
    assert (column.outer, column.inner, column.size, found.size, found.name) == (2, 3, 2, 2, "heads")


def test_a_name_of_its_own_is_not_needed():
    assert Population([Slice(torch.zeros(4))]).name == "population"
    with pytest.raises(ValueError, match="^population: columns is empty"):
        Population([])


def test_the_same_layout_over_other_tensors():
    tensors = [torch.randn(2, 12) for _ in range(3)]
    slice_ = Slice(tensors[0], -1, outer=2, inner=3)
    assert slice_.tensors == (tensors[0],) and slice_.size == 2
    for other in (slice_.on(tensors[1]), slice_.on([tensors[1]])):
        assert (other.tensor is tensors[1], other.dim, other.outer, other.inner) == (True, 1, 2, 3)
    stack = Stack(tensors[:2])
    assert stack.on(tensors[1:]).tensors == tuple(tensors[1:]) and stack.on(tensors[2]).size == 1
