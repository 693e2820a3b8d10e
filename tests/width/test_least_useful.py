"""``Plastic(least_useful=...)``: units of smooth activations go by what they amount to, read off the gradients."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.width.optimizers import OPTIMIZERS, Make, Net, same, train, weights
from tests.width.test_potentials import with_gradient
from torch_meanfield.particles import Slice
from torch_meanfield.width import BirthDeathOptimizer
from torch_meanfield.width.turnover.decide import Evidence, Turnover, Uniform
from torch_meanfield.width.turnover.plastic import MATURE, Plastic
from torch_meanfield.width.turnover.potentials import Outgoing


class Smooth(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.gelu(self.first(x)))


def seen(reach: list[float] | None, age: list[float], quiet: list[float] | None = None) -> Evidence:
    a = torch.tensor(age)
    q = torch.zeros_like(a) if quiet is None else torch.tensor(quiet)
    outgoing = None if reach is None else lambda: torch.tensor(reach)
    return Evidence(torch.zeros_like(a), torch.zeros_like(a), q, a, a - q, 100.0, 16, 0.0, outgoing)


def drawing(value: float) -> Uniform:
    return lambda *shape: torch.full(shape, value)


def born(rule: Plastic, evidence: Evidence, draw: float = 0.0) -> list[int]:
    turnover = rule.decide(evidence, False, drawing(draw))
    assert not turnover.harmful.any() and torch.equal(turnover.index, torch.arange(len(evidence.age)))
    return turnover.born.nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("shape", "dim", "outer", "inner"),
    [((6,), 0, 1, 1), ((3, 6), 1, 1, 1), ((6, 3), 0, 1, 1), ((3, 6, 2, 2), 1, 1, 1), ((3, 24), 1, 2, 2)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reach_is_norm_times_norm_and_bounds_the_potential(
    shape: tuple[int, ...], dim: int, outer: int, inner: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    a, b = with_gradient(*shape, dtype=dtype), with_gradient(5, 6, dtype=dtype)
    reader = Outgoing([Slice(a, dim, outer, inner), Slice(b, 1)])
    reach, potential = reader.reach(), reader.potential()
    assert reach is not None and potential is not None and reach.dtype == torch.float32
    assert (reach >= potential.abs() * (1 - 1e-5)).all()
    for i in range(6):
        entries = torch.tensor([(o * 6 + i) * inner + k for o in range(outer) for k in range(inner)])
        norms = [
            torch.cat([t.index_select(dim, entries).flatten(), u[:, i]]).float().norm()
            for t, u in ((a.detach(), b.detach()), (a.grad, b.grad))
        ]
        torch.testing.assert_close(reach[i], norms[0] * norms[1], rtol=1e-4, atol=1e-4)
    assert Outgoing([Slice(nn.Parameter(torch.ones(3, 6)), 1)]).reach() is None


def test_the_least_useful_of_those_old_enough_go_and_their_share_is_kept_on_the_average() -> None:
    rule = Plastic(least_useful=0.25)
    old = [MATURE + 1.0] * 8
    evidence = seen([5.0, 1.0, 7.0, 0.0, 6.0, 2.0, 8.0, 9.0], old)
    assert born(rule, evidence) == [1, 3]
    assert born(rule, seen([5.0, 1.0, 7.0, 0.0, 6.0, 2.0, 8.0, 9.0], [float(MATURE)] * 8)) == []
    young = [*old[:3], 3.0, *old[4:]]  # 7 that may go: 1.75 of them
    evidence = seen([5.0, 1.0, 7.0, 0.0, 6.0, 2.0, 8.0, 9.0], young)
    assert born(rule, evidence, 0.2) == [1] and born(rule, evidence, 0.3) == [1, 5]
    assert born(Plastic(least_useful=0.01), evidence, 0.9) == []
    assert born(rule, seen(None, old)) == []  # blocks, or no gradient: nothing is known


def test_the_silent_go_first_and_both_are_bounded_together() -> None:
    reach, old = [5.0, 1.0, 7.0, 0.0, 6.0, 2.0, 8.0, 9.0], [1000.0] * 8
    quiet = [0.0, 0, 0, 0, 0, 0, 500, 500]
    assert born(Plastic(least_useful=0.5), seen(reach, old, quiet)) == [1, 3, 5, 6, 7]
    assert born(Plastic(least_useful=0.5, max_share=0.5), seen(reach, old, quiet)) == [1, 3, 6, 7]
    assert born(Plastic(least_useful=0.5, max_share=0.25), seen(reach, old, quiet)) == [6, 7]
    assert born(Plastic(), seen(reach, old, quiet)) == [6, 7]
    parents = Plastic(least_useful=0.5).decide(seen(reach, old, quiet), True, drawing(0.0))
    assert parents.index.tolist() == [0, 0, 2, 0, 4, 0, 0, 0] and not parents.born.any()


def test_training_replaces_what_a_plain_formula_says() -> None:
    model = Smooth()
    expected: list[list[int]] = []

    class Watching(Plastic):
        def decide(self, evidence: Evidence, inherits: bool, uniform: Uniform) -> Turnover:
            a = model.last.weight
            assert a.grad is not None
            plain = a.detach().norm(dim=0) * a.grad.norm(dim=0)
            reach = evidence.reach
            assert reach is not None
            torch.testing.assert_close(reach, plain, rtol=1e-4, atol=1e-7)
            if bool((evidence.age > MATURE).all()) and not expected:
                expected.append(plain.argsort()[:6].sort().values.tolist())
            return super().decide(evidence, inherits, uniform)

    rule = Watching(least_useful=0.25)
    optimizer = BirthDeathOptimizer(
        torch.optim.Adam(model.parameters(), lr=1e-3), model, populations=model.slices(), scheme=rule
    )
    events: list[Any] = []
    optimizer.register_event_hook(events.append)
    train(model, optimizer, range(105))
    assert [(e.step, sorted(e.born.tolist())) for e in events] == [(105, expected[0])]
    assert not any(mask.any() for mask in optimizer.dormant().values())
    train(model, optimizer, range(105, 110))
    again = sorted(set(events[1].born.tolist()))
    assert events[1].step == 110 and not set(again) & set(expected[0])  # the newborn are given their time


def test_relus_are_watched_as_before() -> None:
    assert Plastic().silence(16) == 1 and Plastic(least_useful=0.1).silence(16) is None
    runs = []
    for scheme in ("plastic", Plastic()):
        model = Net()
        optimizer = BirthDeathOptimizer(
            torch.optim.Adam(model.parameters(), lr=1e-2), model, populations=model.slices(), scheme=scheme
        )
        train(model, optimizer, range(40))
        runs.append(weights(model))
    assert same(*runs)


@pytest.mark.parametrize("make", [OPTIMIZERS["sgd-momentum"], OPTIMIZERS["adamw"]])
def test_resuming_is_bit_identical(make: Make) -> None:
    def made(seed: int) -> tuple[Net, BirthDeathOptimizer]:
        model = Smooth(seed)
        rule = Plastic(least_useful=0.1)
        optimizer = make(model.parameters())
        return model, BirthDeathOptimizer(optimizer, model, populations=model.slices(), scheme=rule, seed=seed)

    whole, optimizer = made(0)
    train(whole, optimizer, range(117))
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    before = weights(whole)
    train(whole, optimizer, range(117, 150))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, second = made(7)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    train(resumed, second, range(117, 150))
    assert same(weights(whole), weights(resumed)) and not same(before, weights(whole))


@pytest.mark.parametrize(
    ("value", "error"), [(-0.1, ValueError), (1.0, ValueError), ("all", TypeError), (True, TypeError)]
)
def test_a_bad_share_is_named(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="least_useful must be"):
        Plastic(least_useful=value)
