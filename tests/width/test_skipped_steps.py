"""Nothing happens on a step that was skipped, on gradients that are not finite, and in frozen layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.width.optimizers import Net, backward, same, train, weights, wrap
from torch_meanfield.width import BirthDeathOptimizer


def scaled_training(
    fused: bool, overflow_at: set[int], steps: int
) -> tuple[Net, BirthDeathOptimizer, list[Any], list[list[Tensor]]]:
    """Training under a GradScaler; gradients overflow at some steps. Returns weights after each step, too."""
    model = Net()
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    optimizer = wrap(model, inner, threshold=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    events: list[Any] = []
    optimizer.register_event_hook(events.append)
    trail = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = (model(torch.rand(8, 6)) - 1).square().mean()
        scaler.scale(loss).backward()
        if step in overflow_at:
            model.last.weight.grad[0, 0] = torch.inf  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update()
        trail.append(weights(model))
    return model, optimizer, events, trail


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_at_the_time_of_an_event_skips_the_event(fused: bool) -> None:
    torch.manual_seed(0)
    _, optimizer, events, trail = scaled_training(fused, overflow_at={20}, steps=20)
    assert same(trail[18], trail[19])
    assert optimizer._step_supports_amp_scaling is fused
    assert [e.step for e in events] == [10]
    assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer.optimizer, "grad_scale")


def test_fused_and_plain_scaling_see_the_same_potentials() -> None:
    tables = []
    for fused in (False, True):
        torch.manual_seed(0)
        _, optimizer, _, _ = scaled_training(fused, overflow_at=set(), steps=9)
        tables.append(optimizer._dynamics.averages[0].table)  # type: ignore[union-attr]
    torch.testing.assert_close(*tables, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("where", ["first", "last"])
def test_gradients_that_are_not_finite_allow_no_event(where: str) -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.0 + 1e-3), every=5, window=2, threshold=0.0)
    events: list[Any] = []
    optimizer.register_event_hook(events.append)
    train(model, optimizer, range(4))
    optimizer.zero_grad()
    backward(model, 4)
    getattr(model, where).weight.grad[1, 1] = torch.nan
    with torch.no_grad():  # keep the weights finite, so that only the event could change them
        before = weights(model)
        optimizer.step()
        for p, q in zip(model.parameters(), before, strict=True):
            p.copy_(q)
    assert optimizer.clock == 5 and not events
    train(model, optimizer, range(5, 10))
    assert [e.step for e in events] == [10]


def test_a_frozen_layer_is_left_alone_and_thaws() -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), window=3)
    model.first.weight.requires_grad_(False)
    before = model.first.weight.clone()
    train(model, optimizer, range(25))
    assert torch.equal(model.first.weight, before)
    model.first.weight.requires_grad_(True)
    train(model, optimizer, range(25, 45))
    assert not torch.equal(model.first.weight[:4], before[:4])


def test_accumulating_gradients_does_nothing_until_the_step() -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), every=2, window=1)
    train(model, optimizer, range(1))
    before, clock = weights(model), optimizer.clock
    for step in range(5):
        backward(model, step)
    assert optimizer.clock == clock and same(weights(model), before)


def test_a_step_without_gradients_is_no_step_of_the_averages() -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.zero_grad()
    optimizer.step()
    assert (optimizer._dynamics.averages[0].table == 0).all()  # type: ignore[union-attr]


def test_no_time_passes_at_learning_rate_zero() -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.0))
    train(model, optimizer, range(3))
    assert optimizer.clock == 0


def test_clipping_sees_the_parameters() -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    backward(model, 0)
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1e-6)
    optimizer.step()
    assert float(optimizer._dynamics.averages[0].table[1].sum()) < 1e-5  # type: ignore[union-attr]


def test_an_overflow_at_the_first_step_leaves_a_fused_optimizer_without_state() -> None:
    """Its step would make momentum out of unwritten memory."""
    model = Net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    optimizer, before = wrap(model, inner), weights(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, overflow in enumerate((True, False)):
        optimizer.zero_grad()
        scaler.scale((model(torch.rand(8, 6)) - 1).square().mean()).backward()
        if overflow:
            model.last.weight.grad[0, 0] = torch.inf  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.clock == step and bool(inner.state) is not overflow
        assert same(weights(model), before) is overflow
