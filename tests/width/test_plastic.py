"""``scheme="plastic"``: what is dormant is told by samples, replaced at once, and drawn at the size of the living."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tests.width.optimizers import OPTIMIZERS, Make, Net, backward, same, train, weights
from torch_meanfield.width import BirthDeathOptimizer
from torch_meanfield.width.births.rule import Vacancies
from torch_meanfield.width.births.typical import Typical
from torch_meanfield.width.draws import Draws
from torch_meanfield.width.turnover.decide import Evidence
from torch_meanfield.width.turnover.plastic import WHOLE, Plastic

every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def plastic(model: Net, optimizer: torch.optim.Optimizer, **kwargs: Any) -> BirthDeathOptimizer:
    return BirthDeathOptimizer(optimizer, model, populations=model.slices(), scheme="plastic", **kwargs)


def seen(
    quiet: list[float], age: list[float], batch_size: float | None = 16, fired: list[float] | None = None
) -> Evidence:
    """Units that fired at every step before they fell silent, unless ``fired`` says otherwise."""
    zeros, q, a = torch.zeros(len(quiet)), torch.tensor(quiet), torch.tensor(age)
    return Evidence(zeros, zeros, q, a, a - q if fired is None else torch.tensor(fired), 100.0, batch_size)


def reached_by_nothing(model: Net, steps: int = 5) -> list[int]:
    """The units that fire on no sample of the first batches, by a plain forward pass."""
    from tests.width.optimizers import batch

    fired = torch.stack([(model.first(batch(step)[0]) > 0).any(0) for step in range(steps)]).any(0)
    return (~fired).nonzero().flatten().tolist()


def draws(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@every_optimizer
def test_one_argument_replaces_what_is_dead_and_nothing_else(make: Make) -> None:
    model = Net()
    with torch.no_grad():  # no other unit is ever silent
        model.first.weight[4:].abs_()
    optimizer = plastic(model, make(model.parameters()))
    events: list[Any] = []
    optimizer.register_event_hook(events.append)
    before = weights(model)
    train(model, optimizer, range(5))
    assert [(e.step, sorted(e.born.tolist())) for e in events] == [(5, [0, 1, 2, 3])]
    first, last = (p.detach() for p in model.parameters())
    assert not last[:, :4].any() and (first[:4] != before[0][:4]).all()
    assert optimizer.settings.every == 5 and optimizer.settings.births == "typical"
    assert all(not mask.any() for mask in optimizer.dormant().values())


def test_silence_is_counted_in_samples_whatever_the_window() -> None:
    rule = Plastic(dead_after=80, chance=1.0)
    quiet, age = [0.0, 4.0, 5.0, 500.0], [500.0] * 4
    assert rule.dormant(seen(quiet, age, 16)).tolist() == [False, False, True, True]
    assert rule.dormant(seen(quiet, age, 20)).tolist() == [False, True, True, True]
    assert rule.dormant(seen(quiet, age, None)).tolist() == [False, False, False, True]
    assert rule.silence(16) == 5 and rule.silence(24) == 4 and rule.silence(None) == 80


def test_a_newborn_units_first_step_says_nothing_of_it() -> None:
    rule = Plastic(dead_after=32)
    assert rule.dormant(seen([0.0, 2.0, 3.0], [9.0, 2.0, 3.0])).tolist() == [False, False, True]
    rule = Plastic(chance=1.0)
    assert rule.dormant(seen([0.0, 1.0, 1.0], [9.0, 1.0, 9.0])).tolist() == [False, False, True]


def test_a_rarely_firing_unit_is_told_from_a_dead_one_by_its_own_rate() -> None:
    """Against the probability itself: so many silent steps in a row, at the share of silent steps before them."""
    rule, life = Plastic(chance=1e-4), 200.0
    for fired in (200.0, 199.0, 150.0, 100.0, 20.0, 2.0):
        silent = (life - fired + 1) / (life + 2)
        first = next(k for k in range(1, 10_000) if silent**k <= 1e-4)
        for quiet, dead in ((first - 1.0, False), (float(first), True)):
            if quiet:
                one = seen([quiet, 0.0], [life + quiet, 9.0], 16, [fired, 9.0])
                assert rule.dormant(one).tolist() == [dead, False], (fired, quiet)


def test_what_is_silent_together_is_not_dormant_unless_it_lasts() -> None:
    rule = Plastic(dead_after=32, chance=1.0)
    assert rule.dormant(seen([7.0, 7.0, 8.0, 9.0], [50.0] * 4)).tolist() == [False, False, False, True]
    assert rule.dormant(seen([2.0 * WHOLE] * 3, [1000.0] * 3)).all()


def test_at_most_a_share_goes_at_once_the_longest_silent_first() -> None:
    rule = Plastic(dead_after=16, max_share=0.5, chance=1.0)
    index = rule.decide(seen([0.0, 3.0, 9.0, 5.0], [99.0] * 4), False, draws)
    assert index.born.tolist() == [False, False, True, True] and not index.harmful.any()
    one = Plastic(dead_after=16, max_share=0.01, chance=1.0).decide(
        seen([0.0, 3.0, 9.0, 5.0], [99.0] * 4), False, draws
    )
    assert one.born.tolist() == [False, False, True, False]


def test_a_share_does_not_bound_a_population_that_is_dormant_as_a_whole() -> None:
    rule = Plastic(dead_after=16, max_share=0.25)
    silent = [2.0 * WHOLE] * 4
    assert rule.decide(seen(silent, silent), False, draws).born.tolist() == [True] * 4


@pytest.mark.parametrize("rate, reinject, replaces", [(0.0, 0.0, False), (0.0, 1e-9, True), (1e-9, 0.0, True)])
def test_the_rate_is_a_switch_and_not_a_share(rate: float, reinject: float, replaces: bool) -> None:
    model = Net()
    inner = torch.optim.SGD(model.parameters(), lr=1e-4)
    optimizer = plastic(model, inner, rate=rate, reinject=reinject)
    events: list[Any] = []
    optimizer.register_event_hook(events.append)
    train(model, optimizer, range(5))
    assert [event.born.tolist() for event in events] == [reached_by_nothing(Net())] * replaces


def test_autocast_kills_no_unit_that_lives_and_spares_none_that_is_dead() -> None:
    model = Net()
    optimizer = plastic(model, torch.optim.SGD(model.parameters(), lr=1e-4))
    events: list[Any] = []
    optimizer.register_event_hook(events.append)
    for step in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = backward_loss(model, step)
        loss.backward()
        optimizer.step()
    assert [(event.step, event.born.tolist()) for event in events] == [(5, reached_by_nothing(Net()))]


def test_with_births_from_parents_no_dead_unit_is_one() -> None:
    turnover = Plastic(chance=1.0).decide(seen([0.0, 3.0, 9.0, 0.0], [99.0] * 4), True, draws)
    assert not turnover.born.any() and set(turnover.index[[1, 2]].tolist()) <= {0, 3}


def reference(weight: torch.Tensor, places: torch.Tensor, living: torch.Tensor, seed: int) -> torch.Tensor:
    """Newborn incoming weights one by one: the draw, scaled to the median of those that stay or to He's norm."""
    stay = [i for i in range(len(weight)) if i not in places.tolist()]
    median = sorted(float(weight[i].norm()) for i in stay)[(len(stay) - 1) // 2]
    generator = Draws(torch.Generator().manual_seed(seed)).on(torch.device("cpu"))
    bound = weight.shape[1] ** -0.5
    drawn = torch.empty(len(places), weight.shape[1]).uniform_(-bound, bound, generator=generator)
    he = 2**0.5
    return torch.stack([row * ((median if big else he) / row.norm()) for row, big in zip(drawn, living, strict=True)])


def test_newborn_units_are_as_large_as_the_living_or_as_he_draws_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 41), nn.ReLU(), nn.Linear(41, 2))
    optimizer = BirthDeathOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, example_input=torch.ones(2, 30))
    (tracked,) = optimizer._dynamics.tracked
    with torch.no_grad():
        model[0].weight.mul_(5)
    places = torch.tensor([0, 7, 8, 20, 30, 40])
    vacancies = Vacancies(tracked.population, tracked.initialisers, places, 0, None)
    values = Typical().newborns(vacancies, Draws(torch.Generator().manual_seed(3)))
    # the same draws: first the seed of the values, then who is as large as the living
    again = torch.Generator().manual_seed(3)
    torch.randint(2**62, (1,), generator=again)
    living = torch.rand(6, generator=again) < 0.5
    assert living.any() and not living.all()
    torch.testing.assert_close(values[0].reshape(6, 30), reference(model[0].weight.detach(), places, living, 3))
    assert not values[1].any() and not values[2].any()


def test_under_a_layer_norm_all_are_as_large_as_the_living_under_a_batch_norm_not() -> None:
    for norm, sizes in ((nn.LayerNorm(40), 1), (nn.BatchNorm1d(40), 2)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 40), norm, nn.ReLU(), nn.Linear(40, 2))
        optimizer = BirthDeathOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, example_input=torch.rand(4, 30)
        )
        (tracked,) = optimizer._dynamics.tracked
        vacancies = Vacancies(tracked.population, tracked.initialisers, torch.arange(20), 0, None)
        values = Typical().newborns(vacancies, Draws(torch.Generator().manual_seed(3)))
        norms = values[0].reshape(20, 30).norm(dim=1)
        assert len({round(float(n), 4) for n in norms}) == sizes


def test_where_nobody_is_left_newborn_units_are_as_he_draws_them() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    optimizer = BirthDeathOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, example_input=torch.ones(2, 3, 8, 8)
    )
    (tracked,) = optimizer._dynamics.tracked
    vacancies = Vacancies(tracked.population, tracked.initialisers, torch.arange(8), 0, None)
    values = Typical().newborns(vacancies, Draws(torch.Generator().manual_seed(3)))
    torch.testing.assert_close(values[0].reshape(8, 27).norm(dim=1), torch.full((8,), 2**0.5))


@pytest.mark.parametrize("stop", [10, 12, 14])  # after an event, between two, and while samples are counted
@pytest.mark.parametrize("make", [OPTIMIZERS["sgd-momentum"], OPTIMIZERS["adamw"]])
def test_resuming_is_bit_identical(make: Make, stop: int) -> None:
    def made(seed: int) -> tuple[Net, BirthDeathOptimizer]:
        model = Net(seed)
        return model, plastic(model, make(model.parameters()), reinject=0.1, seed=seed)

    whole, optimizer = made(0)
    train(whole, optimizer, range(stop))
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(whole, optimizer, range(stop, 40))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, second = made(7)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    train(resumed, second, range(stop, 40))
    assert same(weights(whole), weights(resumed))


def test_looking_at_the_averages_changes_nothing() -> None:
    runs = []
    for look in (False, True):
        model = Net()
        optimizer = plastic(model, torch.optim.AdamW(model.parameters(), lr=0.05))
        for step in range(60):
            train(model, optimizer, range(step, step + 1))
            if look:
                optimizer.potentials(), optimizer.dormant()
        runs.append(weights(model))
    assert same(*runs)


def test_accumulated_gradients_and_a_skipped_step_count_what_they_should() -> None:
    model = Net()
    optimizer = plastic(model, torch.optim.SGD(model.parameters(), lr=0.05), dead_after=256)
    for _ in range(5):
        optimizer.zero_grad()
        for part in range(2):
            backward(model, part)
        optimizer.step()
    assert optimizer._dynamics.events.batch_size == 64
    assert [int(age.min()) for age in optimizer.ages().values()] == [0]  # reborn: 5 steps of 64 are more than 256
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(backward_loss(model, step) * (torch.inf if step == 2 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.clock == 9


def backward_loss(model: nn.Module, step: int) -> torch.Tensor:
    from tests.width.optimizers import batch

    x, y = batch(step)
    return (model(x) - y).square().mean()


def test_averaged_copies_take_newborn_units_over() -> None:
    model = Net()
    average = AveragedModel(model)
    optimizer = plastic(model, torch.optim.SGD(model.parameters(), lr=0.0001))
    train(model, optimizer, range(5))
    twin = dict(average.module.named_parameters())
    assert torch.equal(twin["first.weight"][:4], model.first.weight[:4])


def test_a_compiled_model_trains_with_the_batch_size_given() -> None:
    eager, traced = Net(), Net()
    runs = []
    for model, called in ((eager, eager), (traced, torch.compile(traced, backend="eager"))):
        optimizer = plastic(model, torch.optim.SGD(model.parameters(), lr=0.05), batch_size=32)
        train(called, optimizer, range(20))
        runs.append(weights(model))
    assert same(*runs)


def test_a_population_that_is_dead_as_a_whole_is_reborn_with_a_warning() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].bias.fill_(-100)
    optimizer = BirthDeathOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), model, scheme="plastic", dead_after=1, batch_size=32
    )
    events: list[Any] = []
    optimizer.register_event_hook(events.append)
    with pytest.warns(RuntimeWarning, match="all 8 units of .* learning rate is the likely cause"):
        for step in range(10):
            optimizer.zero_grad()
            model(torch.randn(32, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
    assert sorted(events[0].born.tolist()) == list(range(8))


def test_no_unit_dies_of_a_loss_that_says_nothing() -> None:
    model = Net()
    optimizer = plastic(model, torch.optim.SGD(model.parameters(), lr=0.01), dead_after=1)
    before = copy.deepcopy(weights(model))
    for _ in range(200):
        optimizer.zero_grad()
        (model(torch.ones(32, 6)) * 0).sum().backward()
        optimizer.step()
    assert same(before, weights(model))


def test_a_stream_that_makes_no_unit_old_enough_is_told() -> None:
    model = Net()
    optimizer = plastic(model, torch.optim.SGD(model.parameters(), lr=0.01), dead_after=10**9)
    with pytest.warns(RuntimeWarning, match="no unit for long enough to judge it in 1000 steps"):
        train(model, optimizer, range(1001))


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("dead_after", 0, ValueError),
        ("dead_after", 2.5, TypeError),
        ("max_share", 0.0, ValueError),
        ("max_share", 1.5, ValueError),
        ("max_share", "all", TypeError),
        ("chance", 0.0, ValueError),
        ("chance", 1.5, ValueError),
        ("moment_share", -0.1, ValueError),
    ],
)
def test_bad_settings_are_named(name: str, value: Any, error: type[Exception]) -> None:
    model = Net()
    if name != "chance":  # of the rule alone
        with pytest.raises(error, match=name):
            plastic(model, torch.optim.SGD(model.parameters(), lr=0.1), **{name: value})
    if name != "moment_share":
        with pytest.raises(error, match=name):
            Plastic(**{name: value})


def test_a_model_without_populations_is_told_so() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="Linear has 0 proven populations"):
        BirthDeathOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, scheme="plastic", example_input=torch.ones(2, 3)
        )
