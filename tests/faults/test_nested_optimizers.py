"""Optimizers inside the wrapped one: after a load, settings reach all of them, and what cannot be restored is said."""

from __future__ import annotations

import copy
import io
import warnings
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn

from tests.faults.test_unknown_state import Lookahead as Bare
from torch_meanfield import BirthDeathOptimizer
from torch_meanfield.width.optimizer.sharing import optimizers_inside


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def _momentum(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def _wrapped(net: nn.Sequential, make: Any) -> BirthDeathOptimizer:
    return BirthDeathOptimizer(make(net), net, populations=[_units(net)], every=1000)


def _units(net: nn.Sequential) -> Any:
    return [(net[0].weight, 0), (net[0].bias, 0), (net[2].weight, 1)]


def _train(net: nn.Module, optimizer: Any, seed: int, steps: int = 5) -> None:
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()


class TwoStates(Bare):
    """torch_optimizer's Lookahead: one state dict of its own form, in which both states lie."""

    def state_dict(self) -> Any:
        slow, fast = super().state_dict(), self.optimizer.state_dict()
        return {"slow_state": slow["state"], "fast_state": fast["state"], "param_groups": fast["param_groups"]}

    def load_state_dict(self, state_dict: Any) -> None:
        groups = state_dict["param_groups"]
        super().load_state_dict({"state": state_dict["slow_state"], "param_groups": groups})
        self.optimizer.load_state_dict({"state": state_dict["fast_state"], "param_groups": groups})
        self.fast_state = self.optimizer.state


class Delegating(torch.optim.Optimizer):
    """Accelerate's AcceleratedOptimizer and pytorch_optimizer's wrappers: groups by a property."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.state, self.defaults = optimizer, defaultdict(dict), optimizer.defaults

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> Any:
        return {"inner": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: Any) -> None:
        self.optimizer.load_state_dict(state_dict["inner"])


class InList(Delegating):
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizers = [optimizer]
        self.state, self.defaults = defaultdict(dict), optimizer.defaults

    @property
    def optimizer(self) -> Any:
        return self.optimizers[0]


def _timm(name: str, **options: Any) -> Any:
    def make(net: nn.Module) -> Any:
        return pytest.importorskip("timm.optim").create_optimizer_v2(net, name, **options)

    return make


NESTS = {
    "lookahead_momentum of timm": _timm("lookahead_momentum", lr=0.05),
    "lookahead_adamw of timm": _timm("lookahead_adamw", lr=0.01),
    "two states": lambda net: TwoStates(_momentum(net)),
    "by a property": lambda net: Delegating(_momentum(net)),
    "in a list": lambda net: InList(_momentum(net)),
    "twice": lambda net: Delegating(TwoStates(_momentum(net))),
    "plain": _momentum,
}


@pytest.mark.parametrize("name", NESTS)
def test_settings_reach_every_depth_after_a_load(name: str) -> None:
    net, again = _net(), _net()
    optimizer = _wrapped(net, NESTS[name])
    _train(net, optimizer, 1)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = _wrapped(again, NESTS[name])
    again.load_state_dict(net.state_dict())
    schedule = torch.optim.lr_scheduler.LambdaLR(resumed, lambda step: 1.0 if step < 6 else 0.0)
    groups = [(o, o.param_groups, o.state) for o in optimizers_inside(resumed.optimizer)]
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert all(o.param_groups is g and o.state is s for o, g, s in groups)
    _train(net, optimizer, 2)
    _train(again, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    for _ in range(6):
        schedule.step()
    _train(again, resumed, 3, steps=12)  # what is between slow and fast weights comes to rest
    before = copy.deepcopy(again.state_dict())
    _train(again, resumed, 4, steps=6)
    assert all(torch.equal(value, before[k]) for k, value in again.state_dict().items())


def test_what_an_optimizer_does_not_save_of_the_one_inside_it_is_said() -> None:
    """davda54's SAM saves its own state alone."""

    class Sam(torch.optim.Optimizer):
        def __init__(self, net: nn.Module) -> None:
            super().__init__(net.parameters(), {"lr": 0.05})
            self.base_optimizer = torch.optim.SGD(self.param_groups, momentum=0.9)
            self.param_groups = self.base_optimizer.param_groups

        def step(self, closure: Any = None) -> Any:
            return self.base_optimizer.step()

        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)
            self.base_optimizer.param_groups = self.param_groups

    net = _net()
    optimizer = _wrapped(net, Sam)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.state_dict()
    _train(net, optimizer, 1)
    with pytest.warns(RuntimeWarning, match="Sam does not save the state of the SGD inside it"):
        state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert optimizer.optimizer.base_optimizer.param_groups is optimizer.param_groups


def test_a_load_that_leaves_an_optimizer_with_groups_of_its_own_is_an_error() -> None:
    class Stubborn(Delegating):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            super().__init__(optimizer)
            self.box = {"groups": optimizer.param_groups}

        @property
        def param_groups(self) -> Any:  # type: ignore[override]
            return self.box["groups"]

        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)
            self.box["groups"] = [dict(group) for group in self.optimizer.param_groups]

    optimizer = _wrapped(_net(), lambda net: Stubborn(_momentum(net)))
    with pytest.raises(RuntimeError, match="Stubborn keeps its loaded groups"):
        optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", ["adafactor", "adafactorbv", "cadafactor", "novograd"])
@pytest.mark.parametrize("lr", [None, 0.01])
def test_a_number_that_a_step_has_put_where_there_was_none_loads(name: str, lr: float | None) -> None:
    """Adafactor computes its learning rate, and keeps it in the group: saved as a number, loaded where it is None."""
    make = _timm(name, lr=lr)
    try:
        make(_net())
    except TypeError:
        pytest.skip(f"{name} needs a learning rate")
    net, again = _net(), _net()
    optimizer, resumed = (BirthDeathOptimizer(make(n), n, populations=[_units(n)], rate=0.0) for n in (net, again))
    fresh = copy.deepcopy(optimizer.state_dict())
    _train(net, optimizer, 1, steps=1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    resumed.load_state_dict(fresh)
    assert resumed.param_groups[0]["lr"] == make(_net()).param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("default", "saved", "loads"),
    [
        (None, 0.5, True),
        (None, True, True),
        (None, None, True),
        (None, "x", False),
        (None, [1], False),
        (0.1, None, False),
    ],
)
def test_which_values_a_setting_without_default_may_have(default: Any, saved: Any, loads: bool) -> None:
    class Own(torch.optim.SGD):
        def __init__(self, net: nn.Module) -> None:
            super().__init__(net.parameters(), lr=0.1)
            self.defaults["extra"] = default
            for group in self.param_groups:
                group["extra"] = default

    optimizer = _wrapped(_net(), Own)
    state = optimizer.state_dict()
    state["param_groups"][0]["extra"] = saved
    if loads:
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["extra"] == saved
    else:
        with pytest.raises(ValueError, match="'extra'"):
            optimizer.load_state_dict(state)
