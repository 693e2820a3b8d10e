"""The report of the search, models that are hard to follow, and the observer underneath."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torch_meanfield.observe import Call, observe, private_copy
from torch_meanfield.observe.observer import plain_name
from torch_meanfield.width.search.find import find_populations


def deep() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))


def test_report_is_data_and_text() -> None:
    report = find_populations(net := deep(), torch.randn(1, 3))
    assert [p.name for p in report] == ["0.weight", "2.weight"] and len(report) == 2
    assert all(p.owner is net for p in report) and report.refused == ()
    assert str(report).splitlines() == [
        "2 populations, 0 candidates refused",
        "  0.weight: 8 units, 3 columns",
        "  2.weight: 6 units, 3 columns",
    ]


def test_a_layer_used_twice_is_one_set_of_units_or_none() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.shared, self.b = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.shared(torch.tanh(self.shared(torch.tanh(self.a(x)))))))

    net = Twice()
    (population,) = find_populations(net, torch.randn(1, 3))
    owned = {(id(c.tensor), c.dim) for c in population.slices(population.columns)}
    assert {(id(net.shared.weight), 0), (id(net.shared.weight), 1)} <= owned


def test_tied_weights_that_reach_the_output_are_no_population() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[4].weight = net[2].weight
    assert [p.name for p in find_populations(net, torch.randn(1, 8))] == []


def test_recurrence_is_refused_and_the_rest_is_found() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.a, self.b = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.rnn(x)[0]).relu())

    assert [p.name for p in find_populations(Net(), torch.randn(1, 4, 3))] == ["a.weight"]


def test_positions_that_weigh_units_keep_them_in_place() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)
            self.register_buffer("table", torch.arange(8.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.sin(self.a(x)) * torch.linspace(0, 1, 8))

    assert len(find_populations(Net(), torch.randn(1, 3))) == 0


def test_weight_normalisation_keeps_its_hooks() -> None:
    net = deep()
    net[0] = nn.utils.parametrizations.weight_norm(net[0])
    report = find_populations(net, torch.randn(1, 3))
    assert {p.size for p in report} == {8, 6}


def test_transposed_convolution_between_ordinary_ones() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    assert {p.size for p in find_populations(net, torch.randn(1, 3, 4, 4))} == {8, 6}


def test_a_slope_for_each_channel() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.PReLU(8), nn.Conv2d(8, 2, 1))
    (population,) = find_populations(net, torch.randn(1, 3, 4, 4))
    assert any(c.tensor is net[1].weight for c in population.own)


def test_the_observer_names_every_call_alike() -> None:
    calls: list[Call] = []

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = 1 + x
            y += x
            y = torch.add(y, x).add(x) - 1
            return torch.relu_(y @ y.mT)

    out = observe(Net(), torch.randn(2, 2), calls.append)
    assert [c.name for c in calls] == ["add", "add_", "add", "add", "sub", "get_mT", "matmul", "relu_"]
    assert calls[-1].result is out and calls[1].args[0] is calls[1].result
    assert plain_name(Tensor.__rtruediv__) == "div"


def test_the_observer_restores_the_random_state() -> None:
    before = torch.get_rng_state()
    observe(nn.Dropout(0.5), torch.randn(3, generator=torch.Generator()), lambda call: None)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_private_copy_is_not_heard_by_the_users_hooks() -> None:
    net, heard = deep().train(), []
    net.register_forward_pre_hook(lambda *a: heard.append(1))
    copy = private_copy(net)
    copy(torch.randn(1, 3))
    assert not heard and not copy.training and net.training and len(net._forward_pre_hooks) == 1
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        private_copy(3)  # type: ignore[arg-type]
