"""Errors come before effects."""

import copy
import importlib

import pytest
import torch
from torch import nn

from tests.convert.networks import CifarResNet, Ordinary, Stack, images, stack, tokens
from torch_meanfield import conversion_report, convert, fold

CALLS = [
    (lambda: convert(3), TypeError, "convert: model must be a torch.nn.Module, got int"),
    (lambda: convert(nn.Linear(2, 2)), ValueError, "example_input is needed"),
    (lambda: convert(nn.Linear(2, 2), torch.randn(1, 2)), ValueError, "no module adds a branch to its own input"),
    (lambda: convert(stack(1), tokens()), ValueError, "body.0: no block of its kind stands next to it"),
    (lambda: convert(stack(), torch.randn(2, 7)), ValueError, "does not run on the example_input .RuntimeError"),
    (lambda: convert(stack(), tokens(), horizon=0), ValueError, "horizon must be positive"),
    (lambda: convert(stack(), tokens(), include="boddy.*"), ValueError, "include pattern 'boddy.*' matches no"),
    (lambda: convert(stack(), tokens(), exclude=["body.9"]), ValueError, "exclude pattern 'body.9' matches no"),
    (lambda: convert(stack(), tokens(), exclude="body"), ValueError, "left out by include and exclude"),
    (lambda: convert(stack(), tokens(), include=3), TypeError, "include must be"),
    (lambda: fold(stack()), ValueError, "fold: Stack is not converted"),
    (lambda: fold(3), TypeError, "fold: model must be"),
    (lambda: fold(fold(convert(stack(), tokens()))), ValueError, "folded already"),
    (lambda: conversion_report(stack()), ValueError, "conversion_report: Stack is not converted"),
    (lambda: convert(convert(stack(), tokens()), tokens()), ValueError, "is converted already .at 'mean_field_body'"),
    (lambda: convert(nn.Sequential(convert(stack(), tokens())), tokens()), ValueError, "is converted already"),
    (
        lambda: conversion_report(nn.ModuleList(convert(stack(), tokens()) for _ in range(2))),
        ValueError,
        "holds several converted models",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), CALLS, ids=range(len(CALLS)))
def test_what_is_wrong_is_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def _snapshot(model):
    return (
        {n: (type(m), m.training, dict(m.__dict__)) for n, m in model.named_modules()},
        {n: (t, t.clone()) for n, t in model.state_dict(keep_vars=True).items()},
        torch.get_rng_state(),
    )


def _unchanged(model, snapshot):
    modules, tensors, state = snapshot
    now = dict(model.named_modules())
    assert now.keys() == modules.keys()
    for name, (cls, training, attributes) in modules.items():
        assert type(now[name]) is cls and now[name].training == training
        assert now[name].__dict__.keys() == attributes.keys(), name
    present = model.state_dict(keep_vars=True)
    assert present.keys() == tensors.keys()
    assert all(present[n] is t and torch.equal(t, c) for n, (t, c) in tensors.items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [False, True])
def test_a_refusal_leaves_the_model_as_it_was(training):
    model = Stack(Ordinary(kind="silu"), Ordinary(kind="silu")).train(training)
    before = _snapshot(model)
    with pytest.raises(ValueError, match="silu stands behind"):
        convert(model, tokens_of(before))
    _unchanged(model, before)


def tokens_of(snapshot):
    """An example that takes no random numbers."""
    return torch.linspace(-1, 1, 60).reshape(2, 5, 6)


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    torch.manual_seed(0)
    model, x = CifarResNet(), images()
    model.groups[1][1].register_forward_hook(lambda *a: None)
    before = _snapshot(model)
    calls = []

    def failing(module, site):
        calls.append(module)
        if len(calls) > 4:
            raise RuntimeError("half-way")
        attach(module, site)

    conversion = importlib.import_module("torch_meanfield.convert.convert")  # the package exports the function
    attach = conversion.attach
    monkeypatch.setattr(conversion, "attach", failing)
    with pytest.raises(RuntimeError, match="half-way"):
        convert(model, x)
    _unchanged(model, before)


def test_a_conversion_takes_no_random_numbers_and_runs_nothing_of_the_model_itself():
    torch.manual_seed(0)
    model, x = CifarResNet().train(), images()
    twin = copy.deepcopy(model)
    state = torch.get_rng_state()
    convert(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in twin.state_dict().items())
    assert model.training and all(m.training for m in model.modules())


def test_a_stage_whose_block_was_replaced_says_so():
    model = convert(stack(), tokens())
    model.body[1] = Ordinary()
    with pytest.raises(RuntimeError, match="no longer exists"):
        conversion_report(model).stages[0].module.set_tau_([1.0, 2.0, 3.0, 4.0])
