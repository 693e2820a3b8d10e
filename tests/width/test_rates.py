"""The exact scheme against a literal list of particles, and the scale-free one against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from torch_meanfield.width.turnover.decide import add_reinjection, from_parents, reborn
from torch_meanfield.width.turnover.exact import birth_and_death
from torch_meanfield.width.turnover.standing_out import MARGIN, removal, standing_out


def literal_event(potential: list[float], rate_dt: float, draws: torch.Tensor) -> list[int]:
    """(34)/(37) with Python lists: who is killed and cloned, then back to n; returns the sources of all places."""
    n, mean = len(potential), sum(potential) / len(potential)
    acts = [float(draws[0, i]) < 1 - math.exp(-abs(v - mean) * rate_dt) for i, v in enumerate(potential)]
    pool = [(float(draws[1, i]), i, True) for i, v in enumerate(potential) if not (acts[i] and v > mean)]
    pool += [(float(draws[2, i]), i, False) for i, v in enumerate(potential) if acts[i] and v < mean]
    pool.sort()
    kept = pool[:n]
    extra = [kept_source for _, kept_source, survivor in kept if not survivor]
    for place in range(len(kept), n):
        extra.append(pool[min(int(draws[3, place] * len(pool)), len(pool) - 1)][1])  # a product may round up
    places: list[int | None] = [None] * n
    for _, i, survivor in kept:
        if survivor:
            places[i] = i
    return [extra.pop(0) if p is None else p for p in places]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rate_dt", [0.0, 0.1, 1.0, 10.0])
def test_exact_scheme_is_the_literal_one(seed: int, rate_dt: float) -> None:
    g = torch.Generator().manual_seed(seed)
    n = 2 + seed * 9
    potential = torch.randn(n, generator=g, dtype=torch.float64) ** (1 if seed % 2 else 3)
    draws = torch.rand(4, n, generator=g, dtype=torch.float64)
    turnover = birth_and_death(potential, rate_dt, draws)
    assert turnover.index.tolist() == literal_event(potential.tolist(), rate_dt, draws)
    assert not turnover.born.any()


def test_exact_scheme_acts_at_the_rates_of_the_theory() -> None:
    # Expected number of copies of each unit, to first order in dt: 1 - alpha (V - Vbar) dt
    n, dt, trials = 50, 0.05, 4000
    g = torch.Generator().manual_seed(0)
    potential = torch.randn(n, generator=g)
    copies = torch.zeros(n)
    for _ in range(trials):
        copies += birth_and_death(potential, dt, torch.rand(4, n, generator=g)).index.bincount(minlength=n)
    expected = 1 - (potential - potential.mean()) * dt
    assert (copies / trials - expected).abs().max() < 0.03


def test_nothing_happens_at_equal_potentials() -> None:
    turnover = birth_and_death(torch.full((9,), 3.0), 100.0, torch.rand(4, 9))
    assert turnover.index.tolist() == list(range(9)) and turnover.counts().tolist() == [0, 0, 0]


def test_exact_scheme_with_fresh_units_clones_nobody() -> None:
    potential = torch.tensor([1.0, -1.0, 5.0, -5.0])
    turnover = birth_and_death(potential, 1e6, torch.full((4, 4), 0.5), fresh=True)
    assert turnover.index.tolist() == [0, 1, 2, 3]
    assert turnover.born.tolist() == [True, False, True, False]
    assert turnover.counts().tolist() == [2, 2, 2]


def test_only_what_stands_out_is_replaced() -> None:
    mean = torch.tensor([1.0, 1e-9, 2.0, -3.0, 0.5, 0.0, 9.0])
    coherence = torch.tensor([0.9, 0.9, 0.1, -0.9, 0.8, 0.0, 0.9])
    mature = torch.tensor([True, True, True, True, True, True, False])
    quiet = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 100.0, 0.0])
    gain = -torch.ones(7)
    costly = standing_out(mean, coherence, mature, quiet, -gain, 1.0, 0.25, 100)
    assert not costly[0].any() and costly[1].nonzero().flatten().tolist() == [5]  # dead all the same
    harmful, dead = standing_out(mean, coherence, mature, quiet, gain, 1.0, 0.25, 100)
    assert harmful.nonzero().flatten().tolist() == [0, 1, 4]  # 2 is noise, 3 is useful, 6 is new
    assert dead.nonzero().flatten().tolist() == [5]
    tied = torch.ones(10), torch.ones(10), torch.ones(10, dtype=torch.bool), torch.zeros(10)
    assert standing_out(*tied, -torch.ones(10), 0.35, 0.25, 100)[0].nonzero().flatten().tolist() == [0, 1, 2]
    most, _ = standing_out(mean, coherence, mature, quiet, gain, 0.3, 0.25, 100)
    few, still = standing_out(mean, coherence, mature, quiet, gain, 0.1, 0.25, 100)
    assert not few.any() and torch.equal(still, dead)  # a tenth of seven is nobody
    assert most.nonzero().flatten().tolist() == [0, 4]  # the most harmful first


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_scale_of_the_potential_does_not_matter(scale: float) -> None:
    g = torch.Generator().manual_seed(1)
    mean, size = torch.randn(30, generator=g), torch.rand(30, generator=g) + 1
    args = (torch.ones(30, dtype=torch.bool), torch.zeros(30), -torch.ones(30), 0.2, 0.25, 100)
    plain = standing_out(mean, mean / size, *args)
    scaled = standing_out(mean * scale, (mean * scale) / (size * scale), *args)
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))


@pytest.mark.parametrize("shift", [0.4, 1.0, 2.0])
def test_the_cost_of_a_removal_is_read_off_the_noise(shift: float) -> None:
    """Gaussian likelihood of variance 1, y = shift * u + noise, one unit that says u: its loss is (2 shift - 1) / 2."""
    g = torch.Generator().manual_seed(0)
    batch, steps, units = 50, 4000, 8
    u = torch.randn(steps, batch, units, generator=g)
    y = shift * u + torch.randn(steps, batch, units, generator=g)
    v = ((u - y) * u).mean(1)  # V = a dE/da at a = 1, for each step and (independent) unit
    mean, square = v.mean(0), v.square().mean(0)
    true = ((y.square() - (y - u).square()) / 2).mean((0, 1))
    predicted = removal(mean, square, batch)
    torch.testing.assert_close(-mean, true - 0.5, rtol=0, atol=0.02)
    # Fisher's curvature is the true one, 1, where the model is right and larger elsewhere: 1 + 3 (1 - shift)^2
    fisher = 1 + 3 * (1 - shift) ** 2
    torch.testing.assert_close(predicted, MARGIN * fisher / 2 - mean, rtol=0.05, atol=0.05)


def test_a_small_unit_that_pushes_the_wrong_way_may_go_and_a_large_one_may_not() -> None:
    noise = torch.tensor([1e-4, 1.0])  # of V from step to step; the same share of the mean in both
    mean = 0.5 * noise
    cost = removal(mean, mean.square() + noise.square(), batch_size=128)
    assert cost[0] < 0 < cost[1]


def test_copies_come_from_good_units_and_from_nobody_if_there_is_none() -> None:
    harmful = torch.tensor([True, False, False, True, False])
    good = torch.tensor([False, True, False, False, True])
    nobody = torch.zeros(5, dtype=torch.bool)
    draws = torch.tensor([0.0, 0.5, 0.5, 0.99, 0.5])
    assert from_parents(harmful, nobody, good, draws).index.tolist() == [1, 1, 2, 4, 4]
    assert from_parents(harmful, nobody, nobody, draws).index.tolist() == [0, 1, 2, 3, 4]


def test_reinjection_takes_its_share_at_random() -> None:
    g = torch.Generator().manual_seed(0)
    n = 20_000
    still = birth_and_death(torch.zeros(n), 0.0, torch.rand(4, n, generator=g))
    turnover = add_reinjection(still, 0.1, torch.rand(n, generator=g))
    assert abs(turnover.born.float().mean() - 0.1) < 0.01
    assert torch.equal(turnover.index, torch.arange(n)) and not turnover.harmful.any()


def test_draws_at_the_ends_of_their_range() -> None:
    potential = torch.tensor([3.0, -1.0, -2.0, 0.0, 0.0], dtype=torch.float64)
    draws = torch.rand(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws[0] = torch.tensor([0.0, 0.999, 0.999, 0.0, 0.0])  # the first dies, nobody is cloned
    for last in (0.0, 1.0):  # 1: what a draw just below it may be rounded to
        draws[3] = last
        index = birth_and_death(potential, 1.0, draws).index.tolist()
        assert index == literal_event(potential.tolist(), 1.0, draws)
        assert index[1:] == [1, 2, 3, 4] and index[0] != 0
    draws[:] = 0.0  # less than every probability but 0
    assert birth_and_death(potential, 0.0, draws).counts().tolist() == [0, 0, 0]
    assert add_reinjection(birth_and_death(potential, 0.0, draws), 0.0, draws[0]).counts().tolist() == [0, 0, 0]
    good, nobody = torch.tensor([False, True, False, True, False]), torch.zeros(5, dtype=torch.bool)
    assert from_parents(~good, nobody, good, torch.ones(5)).index.tolist() == [3, 1, 3, 3, 3]


def test_one_good_unit_is_parent_enough() -> None:
    good = torch.tensor([False, False, True])
    turnover = from_parents(torch.tensor([True, False, False]), torch.tensor([False, True, False]), good, torch.rand(3))
    assert turnover.index.tolist() == [2, 2, 2] and not turnover.born.any() and not turnover.harmful.any()


def test_harmful_units_stay_harmful_beside_those_that_are_reinjected() -> None:
    harmful, dead = torch.tensor([True, True, False, False]), torch.tensor([False, False, True, False])
    draws = torch.tensor([0.9, 0.1, 0.9, 0.1])
    turnover = add_reinjection(reborn(harmful, dead), 0.5, draws)
    assert turnover.harmful.tolist() == [True, False, False, False]  # the second is drawn anew without a function
    assert turnover.born.tolist() == [True, True, True, True]
    cloned = from_parents(harmful, dead, torch.tensor([False, False, False, True]), torch.rand(4))
    turnover = add_reinjection(cloned, 0.5, draws)
    assert turnover.index.tolist() == [3, 1, 3, 3] and turnover.born.tolist() == [False, True, False, True]


def test_what_only_just_stands_out_does_not() -> None:
    yes = torch.ones(4, dtype=torch.bool)
    mean, coherence = torch.ones(4), torch.tensor([0.25, 0.26, 0.9, 0.9])
    gain = torch.tensor([-1.0, -1.0, 0.0, 0.5])
    harmful, dead = standing_out(mean, coherence, yes, torch.zeros(4), gain, 1.0, 0.25, 10)
    assert harmful.tolist() == [False, True, False, False] and not dead.any()


def test_ties_fill_what_the_more_harmful_leave() -> None:
    yes, mean = torch.ones(6, dtype=torch.bool), torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0, 1.0])
    harmful, _ = standing_out(mean, torch.ones(6), yes, torch.zeros(6), -torch.ones(6), 0.5, 0.25, 10)
    assert harmful.nonzero().flatten().tolist() == [0, 1, 4]
