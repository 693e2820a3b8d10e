"""What bad input gets: an error that names it, before anything has changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.width.optimizers import Net, same, train, weights, wrap
from torch_meanfield.width import BirthDeathOptimizer


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("rate", -0.1, ValueError),
        ("rate", float("nan"), ValueError),
        ("rate", float("inf"), ValueError),
        ("rate", 1.5, ValueError),
        ("rate", "fast", TypeError),
        ("every", 0, ValueError),
        ("every", 2.5, TypeError),
        ("every", True, TypeError),
        ("births", "twins", ValueError),
        ("scheme", "guess", ValueError),
        ("reinject", 1.1, ValueError),
        ("mass", -1.0, ValueError),
        ("candidates", 0, ValueError),
        ("window", 0.5, ValueError),
        ("threshold", -1.0, ValueError),
        ("initializer", 3, TypeError),
    ],
)
def test_settings_are_named(argument: str, value: Any, error: type[Exception]) -> None:
    model = Net()
    with pytest.raises(error, match=argument):
        wrap(model, sgd(model), **{argument: value})


def test_exact_rates_may_exceed_one() -> None:
    model = Net()
    assert wrap(model, sgd(model), scheme="exact", rate=50.0).settings.births == "clone"


def test_what_is_wrapped_must_be_an_optimizer() -> None:
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got list"):
        BirthDeathOptimizer([])  # type: ignore[arg-type]


def test_populations_must_be_named_or_findable() -> None:
    model = Net()
    with pytest.raises(ValueError, match="needs model="):
        BirthDeathOptimizer(sgd(model))
    with pytest.raises(ValueError, match="'auto' or a declaration"):
        BirthDeathOptimizer(sgd(model), model, populations="all")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="populations must be"):
        BirthDeathOptimizer(sgd(model), populations=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="populations is empty"):
        BirthDeathOptimizer(sgd(model), populations=[])
    with pytest.raises(TypeError, match="model must be"):
        BirthDeathOptimizer(sgd(model), "net", populations=model.slices())  # type: ignore[arg-type]
    silent = BirthDeathOptimizer(sgd(model), model)
    with pytest.raises(ValueError, match="was not called before the first step"):
        silent.step()


def test_slices_of_unequal_length() -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"\[24, 3\] units"):
        BirthDeathOptimizer(sgd(model), populations=[(model.first.weight, 0), (model.last.weight, 0)])


def test_a_single_unit() -> None:
    model = Net(units=1)
    with pytest.raises(ValueError, match="1 unit"):
        wrap(model, sgd(model))


def test_a_parameter_that_the_optimizer_does_not_own() -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"populations\[0\]: the tensor of shape \(3, 24\).*add_param_group"):
        wrap(model, torch.optim.SGD([model.first.weight], lr=0.1))


def test_a_dimension_declared_twice() -> None:
    model = Net()
    with pytest.raises(ValueError, match="both own dimension 0"):
        BirthDeathOptimizer(sgd(model), populations=[model.slices(), model.slices()])


@pytest.mark.parametrize("kind", ["factored", "flat"])
def test_state_that_cannot_be_divided_is_named_with_the_way_out(kind: str) -> None:
    model = Net()
    inner: torch.optim.Optimizer
    if kind == "factored":
        inner = torch.optim.Adafactor(model.parameters(), lr=0.1)
    else:
        inner = torch.optim.LBFGS(model.parameters(), lr=0.1)
    optimizer = wrap(model, inner)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.rand(4, 6)).square().mean()
        loss.backward()
        return loss

    with pytest.raises(TypeError, match=rf"{type(inner).__name__} keeps .* use an optimizer whose state"):
        optimizer.step(closure)


def test_a_state_of_another_model_loads_nothing() -> None:
    model, other = Net(), Net(units=25)
    optimizer, second = wrap(model, sgd(model)), wrap(other, sgd(other))
    train(model, optimizer, range(3))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="of another model.*24.*25|of another model.*25.*24"):
        optimizer.load_state_dict(second.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(
        after["birth_death"]["populations"][0]["averages"], before["birth_death"]["populations"][0]["averages"]
    )
    broken = {**before, "birth_death": {"version": 99, **dict.fromkeys(("clock", "generator", "populations"), 0)}}
    with pytest.raises(ValueError, match="version 99"):
        optimizer.load_state_dict(broken)
    with pytest.raises(ValueError, match="not what"):
        optimizer.load_state_dict({**before, "birth_death": 5})


def test_an_error_leaves_model_and_optimizer_as_they_were() -> None:
    model = Net()
    inner, before = sgd(model), weights(model)
    with pytest.raises(ValueError):
        wrap(model, inner, rate=-1.0)
    assert same(weights(model), before) and not inner.state and not model._forward_pre_hooks
    assert not model.first._forward_hooks


def test_callbacks_must_be_callable() -> None:
    model = Net()
    with pytest.raises(TypeError, match="callback"):
        wrap(model, sgd(model)).register_event_hook("print")  # type: ignore[arg-type]
