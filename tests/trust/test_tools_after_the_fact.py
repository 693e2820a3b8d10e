"""Models that are converted, moved or loaded after their optimizer was made."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.trust.tools import Converted, Net, furthest, optimizer_of, train
from torch_meanfield import BirthDeathOptimizer


class Normed(Net):
    """With a batch norm among the hidden units: ``to()`` puts new buffers in the place of the old."""

    def __init__(self) -> None:
        super().__init__()
        first, relu, last = self.hidden
        self.hidden = nn.Sequential(first, nn.BatchNorm1d(24), relu, last)


@pytest.fixture(params=[False, True], ids=["in place", "swapped"])
def swapping(request: Any) -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("made", [Normed, Converted])
def test_a_model_converted_after_its_optimizer_was_made_goes_on(swapping: None, made: type[Net]) -> None:
    """There and back: as if nothing had been done, with the statistics that the model holds now."""
    ends = []
    for converted in (False, True):
        net = made()
        optimizer = optimizer_of(net, steep=False)
        train(net, optimizer, steps=8)
        if converted:
            net.double().float()
        ends.append(train(net, optimizer, steps=16))
        held = {id(t) for t in (*net.parameters(), *net.buffers())}
        assert all(id(c.tensor) in held for p in optimizer.populations for c in p.columns if hasattr(c, "tensor"))
    assert furthest(*ends) == 0.0 and ends[1].resorts > 0 and ends[1].born > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_precision_in_mid_run(dtype: torch.dtype) -> None:
    net = Normed()
    optimizer = optimizer_of(net, steep=False)
    train(net, optimizer, steps=8)
    net.to(dtype)
    for state in optimizer.state.values():  # torch leaves the state as it was; the user converts it
        for key, value in state.items():
            state[key] = value.to(dtype) if isinstance(value, Tensor) else value
    tau = net.stack.tau_axis.offset
    optimizer.state[tau]["momentum_buffer"] = optimizer.state[tau]["momentum_buffer"].to(tau)
    resorts = 0
    births: list[Any] = []
    optimizer.register_event_hook(births.append)
    for step in range(10):
        optimizer.zero_grad()
        net(torch.rand(8, 64, dtype=dtype)).float().square().mean().backward()
        tau.grad += torch.randn(4, generator=torch.Generator().manual_seed(step)).to(tau)
        before = net.stack[0][1].weight.detach().clone()
        optimizer.step()
        resorts += int(not torch.equal(before, net.stack[0][1].weight))
    assert tau.dtype in (torch.float32, torch.float64) and bool((net.stack.tau_axis.read().diff() >= 0).all())
    assert resorts and sum(len(e.born) for e in births) > 0
    assert all(p.dtype == dtype and bool(p.isfinite().all()) for p in net.hidden.parameters())


@pytest.mark.parametrize("replace", ["assign", "overwrite"])
def test_parameters_that_were_replaced_are_named(replace: str) -> None:
    """torch's optimizer goes on with the old ones, which nobody computes with: without a word, were it not for tau."""

    def replaced(net: nn.Module) -> None:
        if replace == "assign":
            net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
            return
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            net.double().float()
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)

    for stepped in (False, True):
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        if stepped:
            net(torch.rand(2, 64)).sum().backward()
            optimizer.step()
        replaced(net)
        net(torch.rand(2, 64)).sum().backward()
        with pytest.raises(
            ValueError, match="steps a tau that is no longer this layer's.* make the optimizer after that"
        ):
            optimizer.step()
        torch.optim.SGD(net.parameters(), lr=0.1).step()  # the way out
        copy.deepcopy(net)
    mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    wrapped = BirthDeathOptimizer(
        torch.optim.SGD(mlp.parameters(), lr=0.1), mlp, example_input=torch.rand(1, 6), every=2, batch_size=4
    )
    replaced(mlp)
    wrapped.step()
    with pytest.raises(ValueError, match="'0.weight' is no longer the tensor that the optimizer trains"):
        wrapped.step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_another_device_in_mid_run() -> None:
    net = Normed()
    optimizer = optimizer_of(net)
    train(net, optimizer, steps=8)
    net.cuda()
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.cuda() if isinstance(value, Tensor) else value
    events: list[Any] = []
    optimizer.register_event_hook(events.append)
    for _ in range(10):
        optimizer.zero_grad()
        net(torch.rand(8, 64, device="cuda")).square().mean().backward()
        optimizer.step()
    assert events and all(p.is_cuda and bool(p.isfinite().all()) for p in net.parameters())
