"""Steep placement: the slope it computes is the gradient a newborn unit gets, and it finds what is steeper."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_meanfield.particles import Slice
from torch_meanfield.width import BirthDeathOptimizer, Neurons
from torch_meanfield.width.births import steep
from torch_meanfield.width.births.activations import KNOWN, recognise
from torch_meanfield.width.births.initialisers import Initialiser, initialisers_of
from torch_meanfield.width.births.landscape import landscape, place
from torch_meanfield.width.births.recorder import LandscapeRecorder, surroundings_of
from torch_meanfield.width.births.reinject import Reinject
from torch_meanfield.width.births.rule import Vacancies
from torch_meanfield.width.births.steep import Steep


class Mlp(nn.Module):
    def __init__(self, act: Any = F.gelu) -> None:
        super().__init__()
        self.first, self.last, self.act = nn.Linear(5, 8), nn.Linear(8, 3), act

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))

    def population(self) -> Neurons:
        columns = [Slice(self.first.weight, 0), Slice(self.first.bias, 0), Slice(self.last.weight, 1)]
        return Neurons(columns, ("in", "in", "out"), owner=self)


class ConvNet(nn.Module):
    def __init__(self, norm: bool, padding_mode: str = "zeros") -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1, stride=2, padding_mode=padding_mode, bias=not norm)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.last = nn.Conv2d(6, 3, 3, padding=1, dilation=1, padding_mode=padding_mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.silu(self.norm(self.first(x))))

    def population(self) -> Neurons:
        columns, roles = [Slice(self.first.weight, 0), Slice(self.last.weight, 1)], ["in", "out"]
        if isinstance(self.norm, nn.BatchNorm2d):
            own = [self.norm.weight, self.norm.bias, self.norm.running_mean, self.norm.running_var]
            columns += [Slice(t, 0) for t in own if t is not None]
            roles += ["own"] * 4
        else:
            columns.append(Slice(self.first.bias, 0))
            roles.append("in")
        return Neurons(columns, roles, owner=self)


MODELS = {
    "mlp": (lambda: Mlp(), (12, 5)),
    "tokens": (lambda: Mlp(torch.tanh), (4, 3, 5)),
    "conv": (lambda: ConvNet(False), (4, 2, 8, 8)),
    "conv-circular": (lambda: ConvNet(False, "circular"), (4, 2, 8, 8)),
    "conv-norm": (lambda: ConvNet(True), (4, 2, 8, 8)),
}


def recorded(model: Any, x: Tensor, passes: int = 1) -> LandscapeRecorder:
    around = surroundings_of(model.population(), model)
    assert around is not None
    recorder = LandscapeRecorder(around, limit=10_000, steps=1)
    recorder.start()
    for _ in range(passes):
        model.zero_grad()
        model(x).square().sum().backward()
    recorder.stop()
    return recorder


@pytest.mark.parametrize("name", MODELS)
def test_the_slope_is_the_gradient_that_a_newborn_units_outgoing_weights_get(name: str) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model: Any = make()
    x = torch.randn(*shape)
    land = landscape(recorded(model, x))
    assert land is not None
    weight = torch.randn_like(model.first.weight[:1])
    bias = None if model.first.bias is None else torch.randn(1)
    slope = land.slope(land.units(weight, bias))
    # put that unit in place 3, outgoing weights 0 and the function therefore as it was, in a model in which place 3
    # had no function either
    with torch.no_grad():
        model.last.weight[:, 3] = 0
    land = landscape(recorded(model, x))
    assert land is not None
    slope = land.slope(land.units(weight, bias))
    with torch.no_grad():
        model.first.weight[3] = weight[0]
        if bias is not None:
            model.first.bias[3] = bias[0]
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(slope[:, 0], model.last.weight.grad[:, 3], rtol=1e-4, atol=1e-4)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_a_sample_of_the_rows_has_gradients_of_the_same_rows(name: str) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model: Any = make().eval()
    x = torch.randn(32, *shape[1:])
    around = surroundings_of(model.population(), model)
    assert around is not None
    recorder = LandscapeRecorder(around, limit=160, steps=1)
    recorder.start()
    outputs = model(x)
    outputs.retain_grad()
    outputs.square().sum().backward()
    recorder.stop()
    (inputs,), (gradients,) = recorder.inputs, recorder.gradients
    rows = x.reshape(-1, x.shape[-1]) if around.linear else x
    of = outputs.grad.reshape(-1, outputs.shape[-1]) if around.linear else outputs.grad
    assert len(inputs) == len(gradients) and len(inputs) <= max(len(rows), 2)
    for a, g in zip(inputs, gradients, strict=True):
        (at,) = [i for i, row in enumerate(rows) if torch.equal(row, a)]
        assert torch.equal(of[at], g)


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_what_is_placed_is_steeper_than_every_candidate(name: str) -> None:
    torch.manual_seed(1)
    make, shape = MODELS[name]
    model: Any = make()
    land = landscape(recorded(model, torch.randn(*shape)))
    assert land is not None
    weight = torch.randn(64, *model.first.weight.shape[1:]) / 5
    bias = torch.randn(64) / 5
    scores = land.score(weight, bias)
    placed = place(land, weight, bias, 1)
    size = placed.slope.flatten().norm()
    assert size >= scores.max() * (1 - 1e-5)
    # refined at constant length
    lengths = torch.cat([weight.flatten(1), bias[:, None]], 1).norm(dim=1)
    assert placed.bias is not None
    length = torch.cat([placed.weight.flatten(1), placed.bias[:, None]], 1).norm()
    assert (lengths - length).abs().min() < 1e-4


def test_newborn_units_do_not_all_go_to_one_place() -> None:
    torch.manual_seed(0)
    model = Mlp(F.relu)
    land = landscape(recorded(model, torch.randn(200, 5)))
    assert land is not None
    placed = place(land, torch.randn(64, 5), torch.zeros(64), 6)
    directions = F.normalize(placed.weight, dim=1)
    assert ((directions @ directions.T).fill_diagonal_(0) < 0.999).all()


@pytest.mark.parametrize("name", KNOWN)
def test_activations_are_recognised_by_what_they_do(name: str) -> None:
    torch.manual_seed(0)
    before = 3 * torch.randn(16, 40)
    assert recognise(before, KNOWN[name](before)) is KNOWN[name]
    # half precision does not tell the two forms of gelu apart, and need not
    found = recognise(before, KNOWN[name](before).bfloat16())
    assert found is not None
    torch.testing.assert_close(found(before), KNOWN[name](before), rtol=1e-2, atol=1e-2)


def test_an_unknown_activation_is_not_guessed() -> None:
    before = torch.randn(16, 40)
    assert recognise(before, before.sin()) is None
    assert recognise(before, before[:, :20]) is None


def test_where_nothing_can_be_seen_units_are_born_as_drawn() -> None:
    torch.manual_seed(0)
    model = Mlp(torch.sin)
    optimizer = BirthDeathOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        populations=model.population(),
        every=5,
        rate=0.5,
        threshold=0.0,
    )
    assert optimizer._dynamics is not None and optimizer._dynamics.recorders
    events: list[Any] = []
    optimizer.register_event_hook(events.append)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(8, 5)).square().mean().backward()
        optimizer.step()
    assert events


def test_hooks_are_only_there_while_they_are_needed_and_copies_have_none() -> None:
    model = Mlp(F.relu)
    optimizer = BirthDeathOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, populations=model.population(), every=100
    )

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 5)).square().mean().backward()
        optimizer.step()

    for _ in range(59):
        step()
    assert not model.first._forward_hooks
    step()
    assert model.first._forward_hooks
    twin = copy.deepcopy(model)
    twin(torch.randn(2, 5))
    assert not twin.first._forward_hooks and model.first._forward_hooks
    for _ in range(40):
        step()
    assert not model.first._forward_hooks and not model.last._forward_hooks


def test_what_overflowed_is_left_out() -> None:
    model = Mlp(F.relu)
    recorder = recorded(model, torch.randn(6, 5))
    recorder.gradients[0][2, 1] = torch.inf
    land = landscape(recorder)
    assert land is not None and land.g.isfinite().all() and not land.g[2].any()


@pytest.mark.parametrize("name", MODELS)
def test_agreement_is_what_the_rows_make_of_the_slope(name: str) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model: Any = make()
    land = landscape(recorded(model, torch.randn(*shape)))
    assert land is not None
    weight = torch.randn(2, *model.first.weight.shape[1:])
    bias = None if model.first.bias is None else torch.randn(2)
    units = land.units(weight, bias)
    slope = land.slope(units)
    for j, agreement in enumerate(land.agreement(units, slope)):
        reader = copy.deepcopy(model.last)
        with torch.no_grad():
            reader.weight.zero_()
            reader.weight[:, 0] = -slope[:, j]
            reader.bias.zero_()
            alone = torch.zeros_like(units).repeat(1, 4, *[1] * (units.ndim - 2))[:, : model.first.weight.shape[0]]
            alone[:, 0] = units[:, j]
            gains = [float((reader(a[None]) * g).sum()) for a, g in zip(alone, land.g, strict=True)]
        expected = abs(sum(gains)) / (len(gains) * sum(u * u for u in gains)) ** 0.5
        assert abs(float(agreement) - expected) < 1e-4 and 0 <= expected <= 1


def test_units_that_coincide_or_reach_nothing_are_no_harm() -> None:
    torch.manual_seed(0)
    model = Mlp(F.relu)
    land = landscape(recorded(model, torch.rand(50, 5)))
    assert land is not None
    land.flatten_(-torch.ones(3, 5), torch.zeros(3))  # reach nothing
    before = land.g.norm()
    land.flatten_(torch.ones(3, 5), torch.zeros(3))  # are one
    assert land.g.isfinite().all() and land.g.norm() <= before


def settings(candidates: int, mass: float = 2.0) -> Steep:
    return Steep(None, mass, candidates)


def draw(population: Neurons, drawn: Any, count: int, generator: torch.Generator, fill: None) -> dict[int, Tensor]:
    return Reinject(fill).draw(Vacancies(population, drawn, torch.arange(count), 0, None), generator)


def steep_values(
    population: Neurons,
    recorder: LandscapeRecorder,
    drawn: Any,
    values: dict[int, Tensor],
    harmful: int,
    rule: Steep,
    generator: torch.Generator,
) -> None:
    rule.steepen_(
        Vacancies(population, drawn, torch.arange(len(values[0][0])), harmful, recorder), recorder, values, generator
    )


class Spy(Initialiser):
    """A law that notes how much is drawn from it."""

    def __init__(self) -> None:
        super().__init__(0.0, 1.0, uniform=False)
        object.__setattr__(self, "drawn", [])

    def draw(self, shape: Any, like: Tensor, generator: torch.Generator) -> Tensor:
        self.drawn.append(shape[0])  # type: ignore[attr-defined]
        return super().draw(shape, like, generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_births_are_written_as_they_were_placed(name: str, dtype: torch.dtype) -> None:
    """Column by column, against what the draws and the placement say."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model: Any = make().to(dtype)
    recorder = recorded(model, torch.randn(*shape, dtype=dtype))
    population, born, harmful, mass = model.population(), 3, 2, 1.5
    laws = initialisers_of(population, model)
    values = draw(population, laws, born, torch.Generator().manual_seed(0), None)
    expected = {i: v.clone() for i, v in values.items()}
    steep_values(population, recorder, laws, values, harmful, settings(32, mass), torch.Generator().manual_seed(1))

    land, generator = landscape(recorder), torch.Generator().manual_seed(1)
    assert land is not None
    at = {id(c.tensor): i for i, c in enumerate(population.slices(population.columns))}
    first, out, bias = at[id(model.first.weight)], at[id(model.last.weight)], at.get(id(model.first.bias))
    weights = laws[first].draw((32, *model.first.weight.shape[1:]), model.first.weight.detach(), generator)
    biases = None if bias is None else laws[bias].draw((32,), model.first.weight.detach(), generator)
    placed = place(land, weights, biases, born)
    expected[first][0, :, 0] = placed.weight
    if bias is not None:
        assert placed.bias is not None
        expected[bias][0, :, 0] = placed.bias
    norm = getattr(model, "norm", None)
    if isinstance(norm, nn.BatchNorm2d):
        mean, variance = land.statistics(placed.weight, placed.bias)
        expected[at[id(norm.running_mean)]][0, :, 0], expected[at[id(norm.running_var)]][0, :, 0] = mean, variance
    else:
        median = model.last.weight.detach().transpose(0, 1).flatten(1).norm(dim=1).median()
        for j in range(harmful):
            slope = placed.slope[:, j]
            expected[out][:, 0, j, 0] = -slope * mass * median * placed.agreement[j] / slope.norm()
    assert values.keys() == expected.keys()
    for i, value in values.items():
        torch.testing.assert_close(value, expected[i])
    assert values[out].any() == (not isinstance(norm, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("candidates", "budget", "tried"),
    # 12 rows times 5 inputs and 3 outputs: 96 multiplications for each candidate
    [(40, 1 << 28, 40), (1000, 96 * 100, 100), (1000, 96 * 101 - 1, 100), (1000, 96 * 10, 64), (30, 96 * 10, 30)],
)
def test_an_event_tries_as_many_as_its_budget_allows(
    candidates: int, budget: int, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(steep, "BUDGET", budget)
    model = Mlp(F.relu)
    population, recorder = model.population(), recorded(model, torch.randn(12, 5))
    laws: dict[int, Initialiser] = {0: Spy(), 1: Spy()}
    values = draw(population, {}, 2, torch.Generator(), None)
    steep_values(population, recorder, laws, values, 0, settings(candidates), torch.Generator())
    assert [law.drawn for law in laws.values()] == [[tried], [tried]]  # type: ignore[attr-defined]
    assert values[0].any() and values[1].any() and not values[2].any()  # nobody was harmful: no mass


@pytest.mark.parametrize(("candidates", "placed"), [(1, 1), (4, 1), (11, 2), (12, 3), (400, 5)])
def test_of_few_candidates_a_quarter_is_placed(candidates: int, placed: int) -> None:
    torch.manual_seed(0)
    model = Mlp(F.relu)
    population, recorder = model.population(), recorded(model, torch.randn(12, 5))
    values = draw(population, {}, 5, torch.Generator(), None)
    steep_values(population, recorder, {0: Spy(), 1: Spy()}, values, 5, settings(candidates), torch.Generator())
    for i in (0, 1):
        assert values[i].flatten(2)[0].abs().sum(1).gt(0).tolist() == [j < placed for j in range(5)]
    assert values[2][:, 0].abs().sum((0, 2)).gt(0).tolist() == [j < placed for j in range(5)]


def test_where_nothing_was_recorded_values_stay_as_drawn_and_without_mass_births_weigh_nothing() -> None:
    torch.manual_seed(0)
    model = Mlp(F.relu)
    population, recorder = model.population(), recorded(model, torch.randn(12, 5))
    laws = initialisers_of(population, model)
    values = draw(population, laws, 2, torch.Generator().manual_seed(0), None)
    steep_values(population, recorder, laws, values, 2, settings(32, mass=0.0), torch.Generator())
    assert not values[2].any()
    around = surroundings_of(population, model)
    assert around is not None
    before = {i: v.clone() for i, v in values.items()}
    steep_values(population, LandscapeRecorder(around, 10, 1), laws, values, 2, settings(32), torch.Generator())
    assert all(torch.equal(v, before[i]) for i, v in values.items())
