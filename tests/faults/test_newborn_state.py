"""What an optimizer keeps for a newborn unit is what it begins with, not 0: of each optimizer, by beginning it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from torch_meanfield.particles import Neurons, Slice, place_
from torch_meanfield.particles.newborn_state import COPY, MOMENT, beginning
from torch_meanfield.particles.optimizer_state import known_optimizers


class ScheduleFree(Optimizer):
    """As schedule-free SGD keeps it: a second sequence that begins as a copy of the parameter."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "train_mode": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("call train() first")
            for p in (p for p in group["params"] if p.grad is not None):
                z = self.state[p].setdefault("z", p.clone())
                z.sub_(p.grad, alpha=group["lr"])
                p.lerp_(z, 0.1)


class Madgrad(Optimizer):
    """As MADGRAD keeps it: sums that begin at 0 and the place where the parameter began."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["grad_sum_sq"], state["s"] = torch.zeros_like(p), torch.zeros_like(p)
                    state["x0"] = p.clone()
                state["grad_sum_sq"].addcmul_(p.grad, p.grad)
                state["s"].add_(p.grad)
                p.copy_(state["x0"] - group["lr"] * state["s"] / (state["grad_sum_sq"].sqrt() + 1e-6))


class Lookahead(Optimizer):
    """As timm's Lookahead: around another optimizer, with slow weights of its own that begin as copies."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups, dict(base.defaults))
        self.base, self.param_groups, self.steps = base, base.param_groups, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.base.step()
        self.steps += 1
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                slow = self.state[p].setdefault("slow", p.clone())
                if self.steps % 5 == 0:
                    p.copy_(slow.lerp_(p, 0.5))


class Ramp(Optimizer):
    """Begins with something that no newborn unit could be given."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("ramp", torch.arange(float(p.numel())).view(p.shape))


BEGINNINGS = {
    "rprop": (lambda p: torch.optim.Rprop(p, lr=0.02), {"prev": 0.0, "step_size": 0.02}),
    "adagrad": (lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.5), {"sum": 0.5}),
    "adagrad from 0": (torch.optim.Adagrad, {"sum": MOMENT}),
    "adam": (torch.optim.Adam, {"exp_avg": 0.0, "exp_avg_sq": MOMENT}),
    "adam, decayed": (lambda p: torch.optim.Adam(p, weight_decay=0.1), {"exp_avg": 0.0, "exp_avg_sq": MOMENT}),
    "sgd, decayed": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1), {"momentum_buffer": 0.0}),
    "adamax": (torch.optim.Adamax, {"exp_avg": 0.0, "exp_inf": None}),
    "asgd": (torch.optim.ASGD, {"ax": COPY}),
    "schedule-free": (ScheduleFree, {"z": COPY}),
    "madgrad": (Madgrad, {"grad_sum_sq": MOMENT, "s": 0.0, "x0": COPY}),
}


def stepped(make: Any) -> tuple[nn.Linear, Optimizer]:
    torch.manual_seed(0)
    layer = nn.Linear(5, 8)
    optimizer = make(layer.parameters())
    layer(torch.randn(4, 5)).square().mean().backward()
    optimizer.step()
    return layer, optimizer


@pytest.mark.parametrize("name", BEGINNINGS)
def test_the_beginning_is_that_of_an_optimizer_that_begins(name: str) -> None:
    make, expected = BEGINNINGS[name]
    layer, optimizer = stepped(make)
    before = {k: v.clone() for k, v in optimizer.state[layer.weight].items() if isinstance(v, Tensor)}
    random = torch.get_rng_state()
    found = beginning(optimizer, layer.weight)
    for key, value in expected.items():
        if value is not None:
            assert found[key] == (pytest.approx(value) if isinstance(value, float) else value)
    after = optimizer.state[layer.weight]
    assert all(torch.equal(v, after[k]) for k, v in before.items())  # nothing of the real one was stepped
    assert torch.equal(random, torch.get_rng_state())
    assert all(len(o.param_groups[0]["params"]) == 2 for o in known_optimizers() if o.state is optimizer.state)


def place(layer: nn.Linear, optimizer: Optimizer) -> None:
    units = Neurons((Slice(layer.weight, 0), Slice(layer.bias, 0)), ("in", "out"))
    values = {0: torch.full((1, 2, 1, 5), 7.0), 1: torch.full((1, 2, 1), 7.0)}
    place_(units, torch.tensor([1, 6]), values, optimizers=[optimizer])


@pytest.mark.parametrize("name", BEGINNINGS)
def test_newborn_units_are_given_it(name: str) -> None:
    make, _ = BEGINNINGS[name]
    layer, optimizer = stepped(make)
    means = {k: v.mean() for k, v in optimizer.state[layer.weight].items() if v.shape == layer.weight.shape}
    begins = beginning(optimizer, layer.weight)
    place(layer, optimizer)
    for key, mean in means.items():
        rows, begin = optimizer.state[layer.weight][key][[1, 6]], begins[key]
        if begin == COPY:
            assert (rows == 7).all()
        else:
            target = 0.01 * mean if begin == MOMENT else torch.tensor(float(begin))
            torch.testing.assert_close(rows, target.expand_as(rows))


def test_an_optimizer_around_another_is_begun_with_it() -> None:
    layer, optimizer = stepped(lambda p: Lookahead(torch.optim.Adam(p, lr=0.1)))
    optimizer.step()
    place(layer, optimizer)
    assert (optimizer.state[layer.weight]["slow"][[1, 6]] == 7).all()
    assert not optimizer.base.state[layer.weight]["exp_avg"][[1, 6]].any()


def test_a_scheduler_changes_what_depends_on_the_learning_rate() -> None:
    layer, optimizer = stepped(lambda p: torch.optim.Rprop(p, lr=0.02))
    scheduler = ExponentialLR(optimizer, 0.5)
    assert beginning(optimizer, layer.weight)["step_size"] == pytest.approx(0.02)
    optimizer.step()
    scheduler.step()
    assert beginning(optimizer, layer.weight)["step_size"] == pytest.approx(0.01)


def test_what_cannot_be_told_is_refused_by_name_and_nothing_is_written() -> None:
    layer, optimizer = stepped(Ramp)
    before = layer.weight.detach().clone()
    with pytest.raises(TypeError, match="Ramp begins 'ramp'"):
        place(layer, optimizer)
    assert torch.equal(before, layer.weight)


def test_what_cannot_be_begun_is_told() -> None:
    layer, optimizer = stepped(ScheduleFree)
    optimizer.param_groups[0]["train_mode"] = False
    with pytest.warns(RuntimeWarning, match="ScheduleFree could not be begun on a stand-in .*call train"):
        place(layer, optimizer)


@pytest.mark.parametrize("steps", [1, 20, 400])
def test_adams_newborn_units_move_as_others_do(steps: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(16, 5)).square().mean().backward()
        optimizer.step()
    place(layer, optimizer)
    before = layer.weight.detach().clone()
    optimizer.zero_grad()
    (layer(torch.randn(16, 5)) - layer(torch.randn(16, 5)).detach()).square().mean().backward()
    layer.weight.grad[[1, 6]] = layer.weight.grad[[0, 2]]  # the gradient that old units have
    optimizer.step()
    moved = (layer.weight.detach() - before).abs()[[1, 6]].mean()
    assert moved < 2e-3  # from 0 it is 3.2 times the learning rate


def test_rprops_newborn_units_train() -> None:
    layer, optimizer = stepped(lambda p: torch.optim.Rprop(p, lr=0.02))
    place(layer, optimizer)
    before = layer.weight.detach().clone()
    layer(torch.randn(4, 5)).square().mean().backward()
    optimizer.step()
    assert (layer.weight[[1, 6]] != before[[1, 6]]).any(1).all()
