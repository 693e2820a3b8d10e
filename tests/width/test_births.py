"""What births leave unchanged, and what they begin anew."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.width.optimizers import Net, backward, batch, train, weights, wrap
from torch_meanfield.particles import Slice, follow, place_, transport_
from torch_meanfield.particles.slices import places_of, read_rows, scale_rows_, write_rows_
from torch_meanfield.width import BirthDeathOptimizer, Event, Neurons
from torch_meanfield.width.births.inherit import Split
from torch_meanfield.width.births.initialisers import Initialiser, initialisers_of
from torch_meanfield.width.births.reinject import Reinject
from torch_meanfield.width.births.rule import Vacancies
from torch_meanfield.width.draws import Draws


class Given(Draws):
    """Draws from the generator it is given."""

    def on(self, device: torch.device) -> torch.Generator:
        return self.generator


def share_(population: Neurons, index: torch.Tensor, jitter: float, generator: torch.Generator) -> None:
    Split(jitter=jitter).share_(population, index, Given(generator))


def neurons(model: Net) -> Neurons:
    return Neurons([Slice(t, d) for t, d in model.slices()], ("in", "out"), owner=model, name="hidden")


def test_split_keeps_the_function() -> None:
    model = Net().double()
    x = torch.rand(64, 6, dtype=torch.float64) - 0.5
    before = model(x)
    index = torch.arange(24)
    index[[3, 5, 9]] = torch.tensor([7, 7, 1])  # 7 has two copies, 1 has one
    with torch.no_grad():
        model.last.weight[:, [3, 5, 9]] = 0  # whoever dies there had no function
    before = model(x)
    transport_(neurons(model), index)
    with torch.no_grad():
        share_(neurons(model), index, 0.0, torch.Generator())
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-14)


def test_split_moves_the_copies_apart_and_the_function_to_second_order() -> None:
    changes = []
    for jitter in (1e-2, 1e-3):
        model = Net().double()
        act = torch.tanh
        with torch.no_grad():
            model.last.weight[:, 3] = 0
        x = torch.rand(64, 6, dtype=torch.float64) - 0.5
        before = model.last(act(model.first(x)))
        index = torch.arange(24)
        index[3] = 7
        transport_(neurons(model), index)
        with torch.no_grad():
            share_(neurons(model), index, jitter, torch.Generator().manual_seed(0))
        assert not torch.equal(model.first.weight[3], model.first.weight[7])
        changes.append((model.last(act(model.first(x))) - before).detach().abs().max().item())
    assert changes[1] < changes[0] / 50  # a hundredth, if it is of second order


def test_a_clone_is_exact_and_takes_its_optimizer_state_along() -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), births="clone", threshold=0.1)
    events: list[Event] = []

    def look(event: Event) -> None:
        events.append(event)
        moved = (event.index != torch.arange(24)).nonzero().flatten()
        for i in moved.tolist():
            j = int(event.index[i])
            assert torch.equal(model.first.weight[i], model.first.weight[j])
            assert torch.equal(model.last.weight[:, i], model.last.weight[:, j])
            state = optimizer.state[model.last.weight]
            assert torch.equal(state["exp_avg"][:, i], state["exp_avg"][:, j])
        table = optimizer._dynamics.averages[0].table  # type: ignore[union-attr]
        assert torch.equal(table[:, moved], table[:, event.index[moved]])

    optimizer.register_event_hook(look)
    train(model, optimizer, range(60))
    assert events and all(len(e.born) == 0 for e in events)


def test_a_dead_unit_is_reborn_alive_without_changing_the_function() -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), threshold=1e9)  # nobody is harmful
    events: list[Event] = []
    before: list[torch.Tensor] = []

    def window() -> torch.Tensor:  # what the potentials were averaged over
        return torch.cat([batch(max(0, optimizer.clock - t))[0] for t in range(1, 5)])

    optimizer.optimizer.register_step_post_hook(lambda *_: before.append(model(window()).detach()))

    def look(event: Event) -> None:
        events.append(event)
        if len(events) == 1:
            assert set(event.born.tolist()) >= {0, 1, 2, 3}
        optimizer.clock -= 1
        torch.testing.assert_close(model(window()), before[-1], rtol=0, atol=1e-6)
        optimizer.clock += 1
        for p in model.parameters():
            first, second = (optimizer.state[p][state] for state in ("exp_avg", "exp_avg_sq"))
            born = (event.born,) if p is model.first.weight else (slice(None), event.born)
            assert not first[born].any()
            assert 0 < second[born].min() == second[born].max() < 0.02 * second.mean()
        assert not model.first.weight.grad[event.born].any()  # type: ignore[index]
        assert not optimizer._dynamics.averages[0].table[:, event.born].any()  # type: ignore[union-attr]

    optimizer.register_event_hook(look)
    train(model, optimizer, range(30))
    assert events and (model.first(batch(0)[0]) > 0).any(0)[[0, 1, 2, 3]].any()


def test_newborn_units_are_written_to_their_places_only() -> None:
    model = Net()
    before = copy.deepcopy(model)
    places = torch.tensor([2, 20])
    values = {0: torch.full((1, 2, 1, 6), 5.0), 1: torch.full((3, 1, 2, 1), 7.0)}
    with torch.no_grad():
        place_(neurons(model), places, values)
    others = [i for i in range(24) if i not in (2, 20)]
    assert (model.first.weight[places] == 5).all() and (model.last.weight[:, places] == 7).all()
    assert torch.equal(model.first.weight[others], before.first.weight[others])
    assert torch.equal(model.last.weight[:, others], before.last.weight[:, others])


@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (3, 1), (1, 4), (3, 4)])
def test_rows_of_repeated_and_wide_units(outer: int, inner: int) -> None:
    tensor = torch.arange(2.0 * outer * 5 * inner).reshape(2, outer * 5 * inner)
    column, places = Slice(tensor, 1, outer, inner), torch.tensor([4, 0])
    expected = tensor.clone()
    old = read_rows(column, places)
    write_rows_(column, places, -1.0)
    for o in range(outer):
        for i in (0, 4):
            expected[:, (o * 5 + i) * inner : (o * 5 + i + 1) * inner] = -1
    assert torch.equal(tensor, expected)
    write_rows_(column, places, old)
    assert torch.equal(tensor, torch.arange(2.0 * outer * 5 * inner).reshape(2, -1))
    scale_rows_(column, torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]))
    assert not tensor.unflatten(1, (outer, 5, inner))[:, :, 0].any()


def test_places_of_a_mask_without_asking_how_many() -> None:
    mask = torch.tensor([False, True, True, False, True])
    assert places_of(mask, 3).tolist() == [1, 2, 4] and places_of(mask, 0).tolist() == []


def test_a_fresh_layer_keeps_its_own_initialiser() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 400), nn.ReLU(), nn.Linear(400, 2))
    with torch.no_grad():
        model[0].bias[:200] -= 10  # half of it dead: newborn units shall not be
    columns = [Slice(model[0].weight, 0), Slice(model[0].bias, 0), Slice(model[2].weight, 1)]
    population = Neurons(columns, ("in", "in", "out"))
    assert initialisers_of(population, model) == {0: Initialiser(0.0, 0.1, True), 1: Initialiser(0.0, 0.1, True)}
    declared = initialisers_of(population, None)
    assert not declared[0].uniform and abs(declared[0].spread - 0.1 / 3**0.5) < 2e-3
    with torch.no_grad():
        model[0].weight.mul_(3)  # a loaded or otherwise initialised layer: the moments it has
    assert not initialisers_of(population, model)[0].uniform
    vacancies = Vacancies(population, initialisers_of(population, model), torch.arange(50), 0, None)
    values = Reinject().draw(vacancies, torch.Generator().manual_seed(0))
    assert values[0].shape == (1, 50, 1, 100) and not values[2].any()
    assert abs(float(values[0].std()) - 0.3 / 3**0.5) < 0.01


def test_the_users_initialiser_fills_incoming_weights() -> None:
    model = Net()

    def fill(rows: list[torch.Tensor], generator: torch.Generator) -> None:
        assert [tuple(r.shape) for r in rows] == [(len(rows[0]), 6)]
        rows[0].fill_(0.25)

    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), initializer=fill, reinject=0.5)
    born: list[torch.Tensor] = []
    optimizer.register_event_hook(lambda e: born.append(model.first.weight[e.born].clone()))
    train(model, optimizer, range(10))
    assert len(born) == 1 and len(born[0]) > 4 and (born[0] == 0.25).all()


@pytest.mark.parametrize("made", ["after", "before"])
def test_averaged_copies_follow(made: str) -> None:
    model = Net()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if made == "before" else None
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05), reinject=0.1, births="clone", threshold=0.1)
    if average is None:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    else:
        assert follow(average.module, model) == 1  # a copy that was made when there was no population yet
    # kept by particle identity: a list of units, moved by hand
    identity = [w.clone() for w in (model.first.weight.detach(), model.last.weight.detach())]
    updates = 0

    def by_hand(event: Event) -> None:
        identity[0] = identity[0][event.index]
        identity[1] = identity[1][:, event.index]
        identity[0][event.born] = model.first.weight[event.born].detach()
        identity[1][:, event.born] = model.last.weight[:, event.born].detach()

    optimizer.register_event_hook(by_hand)
    for step in range(50):
        train(model, optimizer, range(step, step + 1))
        average.update_parameters(model)
        for k, p in enumerate((model.first.weight, model.last.weight)):
            identity[k] = p.detach().clone() if updates == 0 else identity[k].lerp(p.detach(), 1 - 0.9)
        updates += 1
    torch.testing.assert_close(average.module.first.weight.detach(), identity[0])
    torch.testing.assert_close(average.module.last.weight.detach(), identity[1])


def test_a_copy_of_the_model_is_a_model_of_its_own() -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05), reinject=0.5)
    twin = copy.deepcopy(model)
    before = weights(twin)
    train(model, optimizer, range(30))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(twin), strict=True))


def test_momentum_of_another_optimizer_begins_anew_too() -> None:
    model = Net()
    other = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05), reinject=0.2)
    seen: list[bool] = []

    def look(event: Event) -> None:
        rows = other.state[model.last.weight]["momentum_buffer"][:, event.born]
        seen.append(not rows.any())

    optimizer.register_event_hook(look)
    for step in range(10):
        optimizer.zero_grad()
        backward(model, step)
        other.step()
        optimizer.step()
    assert seen == [True]


def test_declared_units_need_no_module() -> None:
    torch.manual_seed(0)
    c, y = torch.randn(20, requires_grad=True), torch.randn(20, requires_grad=True)
    optimizer = BirthDeathOptimizer(
        torch.optim.SGD([c, y], lr=0.01), populations=[(y, 0), (c, 0)], scheme="exact", rate=20.0, every=1
    )
    for _ in range(50):
        optimizer.zero_grad()
        (c * torch.tanh(y)).sum().sub(9).square().backward()
        optimizer.step()
    assert c.isfinite().all() and len(set(y.tolist())) < 20  # clones of useful units


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_split_is_the_literal_one(dtype: torch.dtype) -> None:
    """Outgoing weights shared among a parent and its copies, and every move answered by the parent."""
    torch.manual_seed(0)
    n, jitter = 6, 0.1
    index = torch.tensor([0, 4, 2, 4, 4, 0])  # 4 has two copies, 0 one
    wide = torch.randn(2 * n, 3).to(dtype)  # two rows of every unit, one behind all others
    deep = (3 * torch.randn(2, n)).to(dtype)
    out = torch.randn(4, n).to(dtype)
    columns = [Slice(t.clone(), d, outer=o) for t, d, o in ((wide, 0, 2), (deep, 1, 1), (out, 1, 1))]
    with torch.no_grad():
        share_(Neurons(columns, ("in", "in", "out")), index, jitter, torch.Generator().manual_seed(5))

    generator = torch.Generator().manual_seed(5)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for column, before in ((columns[0], wide), (columns[1], deep)):
        view = column.by_particle(before)
        noise = torch.empty(view.shape, dtype=exact).normal_(generator=generator)
        noise = noise * before.to(exact).square().mean().sqrt() * jitter
        expected = view.to(exact).clone()
        for i, j in enumerate(index.tolist()):
            if i != j:
                at = column.dim + 1
                expected.select(at, i).add_(noise.select(at, i))
                expected.select(at, j).sub_(noise.select(at, i))
        tight = {torch.float32: 1e-6, torch.float64: 1e-15, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(column.by_particle(column.tensor).to(exact), expected, rtol=tight, atol=tight)
    brood = [2, 1, 1, 1, 3, 1]
    shared = torch.stack([out[:, i] / brood[j] for i, j in enumerate(index.tolist())], 1)
    torch.testing.assert_close(columns[2].tensor, shared)


def test_a_parent_whose_place_was_taken_does_not_answer_for_its_copies() -> None:
    index = torch.tensor([1, 0, 2])  # 0 and 1 change places: each is the other's copy, neither is there still
    weight, out = torch.randn(3, 4), torch.randn(2, 3)
    before, generator = weight.clone(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        share_(Neurons([Slice(weight), Slice(out, 1)], ("in", "out")), index, 0.1, generator)
    noise = torch.empty(1, 3, 1, 4).normal_(generator=torch.Generator().manual_seed(0))[0, :, 0]
    moved = noise * before.square().mean().sqrt() * 0.1
    torch.testing.assert_close(weight[:2], (before + moved)[:2])
    assert torch.equal(weight[2], before[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_has_no_law_is_born_as_zeros_and_an_initializer_sees_the_users_layout(dtype: torch.dtype) -> None:
    seen: list[torch.Tensor] = []

    def fill(rows: list[torch.Tensor], generator: torch.Generator) -> None:
        seen.extend(rows)
        for row in rows:
            row.fill_(torch.rand((), generator=generator).item())

    shapes = ((5, 2, 3), 0, 1), ((4, 5), 1, 1), ((4, 10), 1, 2), ((3, 5), 1, 1)
    columns = [Slice(torch.randn(shape, dtype=dtype), d, inner=i) for shape, d, i in shapes]
    population = Neurons(columns, ("in", "in", "in", "out"))
    generator = torch.Generator().manual_seed(3)
    values = Reinject(fill).draw(Vacancies(population, {}, torch.arange(2), 0, None), generator)
    # particles along the column's own dimension, but for columns of several entries for each
    assert [tuple(t.shape) for t in seen] == [(2, 2, 3), (4, 2), (4, 1, 2, 2)]
    again = torch.Generator().manual_seed(3)
    for i in range(3):
        assert (values[i] == torch.rand((), generator=again).item()).all() and values[i].any()
    assert values[3].shape == (3, 1, 2, 1) and not values[3].any()
    assert all(v.dtype == dtype for v in values.values())
