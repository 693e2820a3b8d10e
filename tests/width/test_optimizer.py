"""What torch expects of an optimizer holds of the wrapper, over every optimizer."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.width.optimizers import OPTIMIZERS, Make, Net, backward, batch, same, train, weights, wrap
from torch_meanfield.width import BirthDeathOptimizer
from torch_meanfield.width.births.reinject import Reinject
from torch_meanfield.width.births.rule import Vacancies
from torch_meanfield.width.draws import Draws
from torch_meanfield.width.turnover.decide import Evidence, Turnover, TurnoverRule, Uniform, reborn

every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


@every_optimizer
def test_it_is_an_optimizer_and_shares_everything(make: Make) -> None:
    model = Net()
    inner = make(model.parameters())
    optimizer = wrap(model, inner)
    assert isinstance(optimizer, torch.optim.Optimizer)
    train(model, optimizer, range(3))
    for name in ("param_groups", "state", "defaults"):
        assert getattr(optimizer, name) is getattr(inner, name)
    assert all("birth" not in str(key) for state in inner.state.values() for key in state)


@every_optimizer
def test_rate_zero_is_the_wrapped_optimizer_bit_for_bit(make: Make) -> None:
    bare, wrapped = Net(), Net()
    train(bare, make(bare.parameters()), range(40))
    train(wrapped, wrap(wrapped, make(wrapped.parameters()), rate=0.0), range(40))
    assert same(weights(bare), weights(wrapped))


@every_optimizer
@pytest.mark.parametrize("births", ["reinject", "split", "clone"])
def test_events_happen_and_parameters_keep_identity_and_storage(make: Make, births: Any) -> None:
    model = Net()
    optimizer = wrap(model, make(model.parameters()), births=births, threshold=0.1)
    events: list[Any] = []
    optimizer.register_event_hook(events.append)
    before = [(p, p.data_ptr(), p.stride(), p.shape) for p in model.parameters()]
    train(model, optimizer, range(60))
    assert events
    assert all(
        p is q and p.data_ptr() == at and (p.stride(), p.shape) == (stride, shape)
        for p, (q, at, stride, shape) in zip(model.parameters(), before, strict=True)
    )
    assert all(p.isfinite().all() for p in model.parameters())


@every_optimizer
@pytest.mark.parametrize("stop", [20, 27])  # after an event, and while the next one is being recorded
def test_resuming_is_bit_identical(make: Make, stop: int) -> None:
    whole = Net()
    optimizer = wrap(whole, make(whole.parameters()))
    train(whole, optimizer, range(stop))
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(whole, optimizer, range(stop, 60))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Net(seed=7)
    second = wrap(resumed, make(resumed.parameters()), seed=5)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    train(resumed, second, range(stop, 60))
    assert second.clock == 60
    assert same(weights(whole), weights(resumed))


@every_optimizer
def test_deepcopy_and_pickle_go_on_as_the_original(make: Make) -> None:
    model = Net()
    optimizer = wrap(model, make(model.parameters()))
    train(model, optimizer, range(27))
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    train(model, optimizer, range(27, 50))
    for other, its in copies:
        assert its.param_groups is its.optimizer.param_groups
        assert {id(p) for g in its.param_groups for p in g["params"]} == {id(p) for p in other.parameters()}
        train(other, its, range(27, 50))
        assert same(weights(model), weights(other))


@every_optimizer
def test_groups_and_state_stay_the_same_objects_when_a_state_is_loaded(make: Make) -> None:
    model = Net()
    optimizer = wrap(model, make(model.parameters()))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5)
    groups, group, state = optimizer.param_groups, optimizer.param_groups[0], optimizer.state
    train(model, optimizer, range(4), scheduler)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is groups is optimizer.optimizer.param_groups
    assert optimizer.param_groups[0] is group and optimizer.state is state is optimizer.optimizer.state
    before = group["lr"]
    train(model, optimizer, range(4, 8), scheduler)
    assert optimizer.optimizer.param_groups[0]["lr"] == before / 2


@every_optimizer
def test_states_pass_between_the_wrapper_and_a_bare_optimizer(make: Make) -> None:
    model, bare = Net(), Net()
    optimizer, inner = wrap(model, make(model.parameters())), make(bare.parameters())
    train(model, optimizer, range(5))
    inner.load_state_dict(optimizer.state_dict())  # the key that is not torch's is not looked at
    train(bare, inner, range(5))
    wrapper = wrap(bare, make(bare.parameters()))
    wrapper.load_state_dict(inner.state_dict())
    assert wrapper.clock == 0 and (wrapper._dynamics.averages[0].table == 0).all()  # type: ignore[union-attr]
    train(bare, wrapper, range(5, 8))


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # SequentialLR's own call, in torch 2.6
@pytest.mark.parametrize("scheduler", ["cosine", "plateau", "onecycle", "sequential"])
def test_schedulers_drive_both(scheduler: str) -> None:
    from torch.optim import lr_scheduler as s

    lrs = []
    for wrapped in (False, True):
        model = Net()
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer = wrap(model, inner) if wrapped else inner
        driver: Any = {
            "cosine": lambda o: s.CosineAnnealingLR(o, 20),
            "plateau": lambda o: s.ReduceLROnPlateau(o, patience=2),
            "onecycle": lambda o: s.OneCycleLR(o, 0.1, total_steps=30),
            "sequential": lambda o: s.SequentialLR(o, [s.LinearLR(o), s.ExponentialLR(o, 0.9)], [5]),
        }[scheduler](optimizer)
        seen = []
        for step in range(20):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
            driver.step(1.0) if scheduler == "plateau" else driver.step()
            seen.append(inner.param_groups[0]["lr"])
        lrs.append(seen)
    assert lrs[0] == lrs[1]


@every_optimizer
def test_a_closure_is_called_once_and_its_gradients_are_seen(make: Make) -> None:
    plain, closed = Net(), Net()
    one, two = wrap(plain, make(plain.parameters())), wrap(closed, make(closed.parameters()))
    train(plain, one, range(30))
    calls = 0
    for step in range(30):

        def closure(at: int = step) -> torch.Tensor:
            nonlocal calls
            calls += 1
            two.zero_grad()
            return backward(closed, at)

        assert two.step(closure).item() > 0
    assert calls == 30 and same(weights(plain), weights(closed))


def test_a_closure_that_is_called_several_times_is_read_once() -> None:
    class Searching(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                closure(), closure()
            return super().step(closure)

    model = Net()
    optimizer = wrap(model, Searching(model.parameters(), lr=0.1))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return backward(model, 0)

    optimizer.step(closure)
    assert optimizer.clock == 1
    table = optimizer._dynamics.averages[0].table  # type: ignore[union-attr]
    torch.testing.assert_close(table[2], torch.full_like(table[2], 1 / optimizer.settings.window))


def test_a_group_can_be_added() -> None:
    model, more = Net(), torch.nn.Parameter(torch.ones(3))
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.add_param_group({"params": [more], "lr": 0.5})
    assert optimizer.optimizer.param_groups[1]["params"][0] is more
    more.grad = torch.ones(3)
    train(model, optimizer, range(1))
    more.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(more.detach(), torch.full((3,), 0.5))


def test_hooks_run_once_each_with_the_optimizer_they_were_registered_on() -> None:
    model = Net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = wrap(model, inner)
    calls: list[tuple[str, object]] = []
    optimizer.register_step_pre_hook(lambda o, a, k: calls.append(("outer pre", o)))
    inner.register_step_pre_hook(lambda o, a, k: calls.append(("inner pre", o)))
    inner.register_step_post_hook(lambda o, a, k: calls.append(("inner post", o)))
    optimizer.register_step_post_hook(lambda o, a, k: calls.append(("outer post", o)))
    handle = register_optimizer_step_post_hook(lambda o, a, k: calls.append(("global", o)))
    try:
        train(model, optimizer, range(1))
    finally:
        handle.remove()
    assert [name for name, _ in calls] == ["outer pre", "inner pre", "inner post", "global", "outer post"]
    assert all(o is (optimizer if name.startswith("outer") else inner) for name, o in calls)
    saved: list[object] = []
    optimizer.register_state_dict_post_hook(lambda o, d: saved.append(o))
    optimizer.register_load_state_dict_pre_hook(lambda o, d: saved.append(o))
    optimizer.register_load_state_dict_post_hook(lambda o: saved.append(o))
    optimizer.load_state_dict(optimizer.state_dict())
    assert saved == [optimizer] * 3


def test_averages_are_not_cast_to_the_dtype_of_the_parameters() -> None:
    model = Net().to(torch.bfloat16)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    for step in range(3):
        x, y = batch(step)
        optimizer.zero_grad()
        (model(x.bfloat16()) - y.bfloat16()).square().mean().backward()
        optimizer.step()
    before = optimizer._dynamics.averages[0].table.clone()  # type: ignore[union-attr]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    after = optimizer._dynamics.averages[0].table  # type: ignore[union-attr]
    assert after.dtype == torch.float32 and torch.equal(before, after)


def test_distributed_checkpoint_sees_an_ordinary_optimizer() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = Net()
    optimizer = wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    assert get_optimizer_state_dict(model, optimizer)["param_groups"]  # initialises by a step with lr 0
    assert optimizer.clock == 0
    train(model, optimizer, range(3))
    saved = get_optimizer_state_dict(model, optimizer)
    assert "first.weight" in saved["state"]
    set_optimizer_state_dict(model, optimizer, saved)
    train(model, optimizer, range(3, 6))


def test_optimizers_with_methods_of_their_own_keep_them() -> None:
    class Switching(torch.optim.SGD):
        def train(self) -> str:
            return "training"

    model = Net()
    assert wrap(model, Switching(model.parameters(), lr=0.1)).train() == "training"
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = wrap(model, Switching(model.parameters(), lr=0.1)).nothing_of_the_kind


def test_two_runs_are_alike_and_the_seed_matters() -> None:
    results = []
    for seed in (0, 0, 1):
        model = Net()
        train(model, wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), seed=seed), range(40))
        results.append(weights(model))
        torch.rand(3)  # the global generator plays no part
    assert same(results[0], results[1]) and not same(results[0], results[2])


def test_events_draw_nothing_from_the_global_generator() -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    state = torch.get_rng_state()
    train(model, optimizer, range(40))
    assert torch.equal(state, torch.get_rng_state())


def test_resting_is_the_wrapped_optimizer() -> None:
    bare, wrapped = Net(), Net()
    optimizer = wrap(wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1))
    optimizer.enabled = False
    train(bare, torch.optim.SGD(bare.parameters(), lr=0.1), range(30))
    train(wrapped, optimizer, range(30))
    assert same(weights(bare), weights(wrapped)) and isinstance(optimizer, BirthDeathOptimizer)


def test_hooks_of_state_dicts_see_and_may_replace_them() -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    train(model, optimizer, range(3))
    seen: list[Any] = []
    handles = [
        optimizer.register_state_dict_pre_hook(seen.append),
        optimizer.register_state_dict_post_hook(lambda o, d: {**d, "noted": sorted(d)}),
        optimizer.register_load_state_dict_pre_hook(
            lambda o, d: {**d, "birth_death": {**d["birth_death"], "clock": 9}}
        ),
        optimizer.register_load_state_dict_post_hook(seen.append),
    ]
    state = optimizer.state_dict()
    assert state["noted"] == ["birth_death", "param_groups", "state"]
    optimizer.load_state_dict(state)
    assert optimizer.clock == 9 and state["birth_death"]["clock"] == 3  # what was given is not written to
    assert seen == [optimizer, optimizer] and "noted" in state
    for handle in handles:
        handle.remove()
    with pytest.raises(ValueError, match="state_dict must be a dict, got list"):
        optimizer.load_state_dict([])  # type: ignore[arg-type]


def test_a_bare_state_begins_time_and_averages_anew() -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), scheme="exact", rate=0.1)
    train(model, optimizer, range(5))
    dynamics = optimizer._dynamics
    assert dynamics is not None and dynamics.tracked[0].elapsed > 0 and dynamics.averages[0].table.any()
    optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    assert optimizer.clock == 0 and dynamics.tracked[0].elapsed == 0.0 and not dynamics.averages[0].table.any()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_has_no_hooks_and_a_generator_of_its_own(way: Any) -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    torch.optim.lr_scheduler.StepLR(optimizer, 5)  # patches step, and notes its calls
    train(model, optimizer, range(3))
    optimizer.register_event_hook(lambda event: pytest.fail("another's callback"))  # cannot be pickled
    optimizer.register_step_post_hook(lambda *_: pytest.fail("another's hook")).remove()
    twin, its = way((model, optimizer))
    assert not its._callbacks and its._draws.generator is not optimizer._draws.generator and its.clock == 3
    assert its.step.__self__ is its and "_opt_called" not in its.__dict__
    assert its._dynamics.events.draws is its._draws
    before = weights(model)
    train(twin, its, range(3, 12))
    assert same(before, weights(model)) and optimizer.clock == 3 and its.clock == 12
    optimizer.register_step_post_hook(lambda *_: None)  # with hooks, too
    assert not way(optimizer)._optimizer_step_post_hooks


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_made_before_the_populations_are_known_finds_its_own(way: Any) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    optimizer = BirthDeathOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, every=10)
    twin, its = way((model, optimizer))
    train(twin, its, range(2))
    assert [p.size for p in its.populations] == [16] and optimizer.populations == []
    assert its.populations[0].incoming[0].tensor is twin[0].weight
    at_rest = BirthDeathOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, rate=0.0)
    still, bare = way((model, at_rest))
    train(still, bare, range(2))
    assert bare.populations == []


def test_it_shows_what_it_wraps() -> None:
    model = Net()
    shown = repr(wrap(model, torch.optim.SGD(model.parameters(), lr=0.125)))
    assert shown.startswith("BirthDeathOptimizer(1 populations, Settings(rate=0.1, every=10")
    assert "around SGD (" in shown and "lr: 0.125" in shown


def test_learning_rates_that_are_tensors() -> None:
    for rates, steps in (((0.0, 0.0), 0), ((0.1, 0.1), 2), ((0.0, 0.1), 2)):
        model = Net()
        groups = [{"params": [p], "lr": lr} for p, lr in zip(model.parameters(), rates, strict=True)]
        optimizer = wrap(model, torch.optim.SGD(groups, lr=1.0))
        train(model, optimizer, range(2))
        assert optimizer.clock == steps
    for rate, steps in ((0.0, 0), (0.1, 2)):
        model = Net()
        optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=torch.tensor(rate)))
        train(model, optimizer, range(2))
        assert optimizer.clock == steps


def test_window_and_births_follow_the_scheme_unless_they_are_given() -> None:
    def settings(**kwargs: Any) -> Any:
        model = Net()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        return BirthDeathOptimizer(inner, model, populations=model.slices(), **kwargs).settings

    default = settings()
    assert (default.rate, default.every, default.births, default.scheme) == (0.1, 200, "reinject", "standing_out")
    assert (default.window, default.threshold, default.reinject, default.steep) == (100, 3.0, 0.0, True)
    assert (default.mass, default.candidates, default.batch_size) == (2.0, 1024, None)
    assert settings(every=1).window == 1 and settings(every=31).window == 15.5 and settings(window=7).window == 7
    exact = settings(scheme="exact")
    assert (exact.window, exact.births) == (1, "clone")
    assert settings(scheme="exact", births="split").births == "split" and settings(steep=0).steep is False


class Scaled(torch.optim.SGD):
    """Its step takes an argument of its own, and its groups have no learning rate."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            group["speed"] = group.pop("lr")

    @torch.no_grad()
    def step(self, closure: Any = None, *, by: float = 0.0) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(by * group["speed"] * p.grad)
        return loss


@pytest.mark.parametrize("enabled", [True, False])
def test_closures_and_arguments_are_passed_on_at_work_and_at_rest(enabled: bool) -> None:
    results = []
    for wrapped in (True, False):
        model = Net()
        inner = Scaled(model.parameters())
        optimizer: Any = wrap(model, inner, every=1000) if wrapped else inner
        if wrapped:
            optimizer.enabled = enabled
        losses = []
        for step in range(3):

            def closure(step: int = step, optimizer: Any = optimizer, model: Net = model) -> torch.Tensor:
                optimizer.zero_grad()
                return backward(model, step)

            losses.append(optimizer.step(closure, by=0.5))
            backward(model, step)
            assert optimizer.step(by=0.25) is None
        if wrapped:
            assert optimizer.clock == (6 if enabled else 0)
        results.append([*weights(model), *(loss.detach() for loss in losses)])
    assert same(*results)


def test_gradients_are_dropped_or_zeroed_as_torch_does_it() -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    backward(model, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_what_is_known_of_the_units_can_be_looked_at() -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.0001), every=50, window=4.0)
    train(model, optimizer, range(6))
    (population,) = optimizer.populations
    potentials, ages, dormant = (
        view()[population.name] for view in (optimizer.potentials, optimizer.ages, optimizer.dormant)
    )
    assert potentials.shape == ages.shape == dormant.shape == (population.size,)
    assert ages.tolist() == [6.0] * population.size and dormant.dtype == torch.bool
    assert potentials.any() and not dormant.all() and not potentials[dormant].any()
    ages.zero_()  # a copy: what the optimizer knows stays
    assert optimizer.ages()[population.name].all()


def test_dormant_units_are_those_that_reached_nothing_for_a_window() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    with torch.no_grad():
        model[0].bias[:3] = -100.0
    optimizer = BirthDeathOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model, every=50, window=4.0)
    for steps in range(1, 7):
        optimizer.zero_grad()
        model(torch.randn(64, 6)).square().mean().backward()
        optimizer.step()
        assert optimizer.dormant()["0.weight"].tolist() == [steps >= 4 and i < 3 for i in range(8)]


@dataclass(frozen=True)
class Oldest(TurnoverRule):
    """Replaces the two units that have been watched longest."""

    def decide(self, seen: Evidence, inherits: bool, uniform: Uniform) -> Turnover:
        oldest = torch.zeros_like(seen.mature).index_fill(0, seen.age.topk(2).indices, True)
        return reborn(torch.zeros_like(oldest), oldest)


@dataclass(frozen=True)
class Constant(Reinject):
    """Newborn units read with one number."""

    value: float = 0.5

    def newborns(self, vacancies: Vacancies, draws: Draws) -> dict[int, torch.Tensor]:
        values = super().newborns(vacancies, draws)
        return {i: v.fill_(self.value) if i in vacancies.initialisers else v for i, v in values.items()}


def test_a_scheme_and_a_way_of_being_born_can_be_written_by_the_user() -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.01), every=3, scheme=Oldest(), births=Constant())
    born: list[torch.Tensor] = []
    optimizer.register_event_hook(lambda e: born.append(e.born))
    optimizer.register_event_hook(lambda e: born.append(model.first.weight[e.born]))
    train(model, optimizer, range(3))
    assert len(born[0]) == 2 and bool((born[1] == 0.5).all())
    assert optimizer.settings.window == 1.5 and "Oldest()" in repr(optimizer)


@pytest.mark.parametrize("options", [{"scheme": Oldest}, {"scheme": object()}, {"births": 3}, {"births": "die"}])
def test_what_is_no_rule_is_refused(options: dict[str, Any]) -> None:
    model = Net()
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be one of .* or a rule with the methods"):
        wrap(model, torch.optim.SGD(model.parameters(), lr=0.01), **options)
