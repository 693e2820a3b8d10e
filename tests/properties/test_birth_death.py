"""Birth and death over random populations, rates and optimizers: as many units as before, and a run that resumes."""

from __future__ import annotations

import io
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.properties.strategies import SEEDS
from tests.width.optimizers import OPTIMIZERS, Net, batch, train, wrap
from tools.faults.hostile_files import fingerprint
from torch_meanfield import Slice, transport_
from torch_meanfield.particles.neurons import neurons_from
from torch_meanfield.width.births.inherit import Split
from torch_meanfield.width.draws import Draws
from torch_meanfield.width.turnover.decide import Turnover, add_reinjection, from_parents, reborn
from torch_meanfield.width.turnover.exact import birth_and_death
from torch_meanfield.width.turnover.standing_out import standing_out

SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "births": st.sampled_from(("clone", "split", "reinject")),
    "scheme": st.sampled_from(("standing_out", "exact")),
    "rate": st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    "reinject": st.sampled_from((0.0, 0.1, 1.0)),
    "every": st.integers(1, 6),
    "steep": st.booleans(),
    "seed": SEEDS,
}


def check(turnover: Turnover, n: int) -> None:
    index, born = turnover.index, turnover.born
    assert index.shape == born.shape == turnover.harmful.shape == (n,)
    assert index.dtype == torch.int64 and bool(((index >= 0) & (index < n)).all())
    assert bool((born | ~turnover.harmful).all())
    moved, newborn, _ = turnover.counts().tolist()
    assert moved == len({i for i in range(n) if index[i] != i or born[i]}) and newborn == int(born.sum())


@given(st.integers(1, 12), st.one_of(st.floats(0, 50), st.just(1e9)), st.booleans(), SEEDS)
def test_the_exact_scheme_keeps_the_population_and_kills_above_the_mean(
    n: int, rate: float, fresh: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    potential = torch.randn(n, dtype=torch.float64)
    turnover = birth_and_death(potential, rate, torch.rand(4, n, dtype=torch.float64), fresh=fresh)
    check(turnover, n)
    high = potential > potential.mean()
    if rate == 1e9 and n > 1:  # all above the mean die, and none of them has a clone
        gone = turnover.born if fresh else ~torch.isin(torch.arange(n), turnover.index)
        assert bool(gone[high].all())
    if rate == 0:
        assert turnover.counts().tolist() == [0, 0, 0]


@given(st.integers(1, 12), st.floats(0, 1), st.floats(0, 1), SEEDS)
def test_the_default_scheme_keeps_the_population_and_its_bounds(n: int, share: float, again: float, seed: int) -> None:
    torch.manual_seed(seed)
    mean, gain = torch.randn(n).round(decimals=1), torch.randn(n)
    mature, quiet, good = torch.rand(n) < 0.8, torch.randint(0, 8, (n,)).float(), torch.rand(n) < 0.3
    harmful, dead = standing_out(mean, mean.sign(), mature, quiet, gain, share, 0.5, 4.0)
    assert int(harmful.sum()) <= int(share * n) and not bool((harmful & dead).any())
    for turnover in (reborn(harmful, dead), from_parents(harmful, dead, good, torch.rand(n))):
        check(turnover, n)
        check(add_reinjection(turnover, again, torch.rand(n)), n)


@given(st.sampled_from(sorted(OPTIMIZERS)), st.integers(2, 9), st.fixed_dictionaries(SETTINGS))
def test_births_conserve_the_population_and_every_tensor_stays_where_it_is(
    name: str, units: int, settings: dict[str, Any]
) -> None:
    net = Net(units=units + 4)
    optimizer = wrap(net, OPTIMIZERS[name](net.parameters()), **settings)
    where = [(id(p), p.data_ptr(), p.shape, p.stride()) for p in net.parameters()]
    events: list[Any] = []
    optimizer.register_event_hook(events.append)
    train(net, optimizer, range(8))
    assert [(id(p), p.data_ptr(), p.shape, p.stride()) for p in net.parameters()] == where
    assert [p.size for p in optimizer.populations] == [units + 4]
    for event in events:
        assert event.index.shape == (units + 4,) and int(event.index.max()) < units + 4 and int(event.index.min()) >= 0
        assert len(set(event.born.tolist())) == len(event.born)
    assert all(bool(p.isfinite().all()) for p in net.parameters())
    if settings["rate"] == settings["reinject"] == 0:
        bare = Net(units=units + 4)
        train(bare, OPTIMIZERS[name](bare.parameters()), range(8))
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), bare.parameters(), strict=True))


@given(st.sampled_from(sorted(OPTIMIZERS)), st.integers(0, 9), st.fixed_dictionaries(SETTINGS))
def test_a_checkpoint_of_the_wrapper_goes_round_through_a_file_and_the_run_goes_on(
    name: str, steps: int, settings: dict[str, Any]
) -> None:
    net = Net(units=8)
    optimizer = wrap(net, OPTIMIZERS[name](net.parameters()), **settings)
    train(net, optimizer, range(steps))
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = Net(seed=1, units=8)
    resumed = wrap(other, OPTIMIZERS[name](other.parameters()), **{**settings, "seed": settings["seed"] + 1})
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert fingerprint(resumed.state_dict()) == fingerprint(optimizer.state_dict())
    train(net, optimizer, range(steps, steps + 7))
    train(other, resumed, range(steps, steps + 7))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert fingerprint(resumed.state_dict()) == fingerprint(optimizer.state_dict())


@given(st.integers(1, 8), SEEDS)
def test_a_split_into_silent_places_keeps_the_function(parents: int, seed: int) -> None:
    torch.manual_seed(seed)
    net = Net(units=12).double()
    population = neurons_from([Slice(net.first.weight, 0), Slice(net.last.weight, 1)], "hidden")
    with torch.no_grad():
        net.last.weight[:, :4] = 0  # those whose places are taken
        x = batch(0)[0].double()
        before = net(x)
        index = torch.arange(12)
        index[:4] = torch.randint(4, 4 + parents, (4,))
        transport_(population, index)
        Split(jitter=0.0).share_(population, index, Draws(torch.Generator().manual_seed(seed)))
        torch.testing.assert_close(net(x), before, rtol=0, atol=1e-12)
