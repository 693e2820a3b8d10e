"""``torch.compile`` in a training with re-sorts and births: one compilation, no broken graph, the numbers of eager."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from tests.trust.tools import Net, furthest, optimizer_of, train
from torch_meanfield import BirthDeathOptimizer, conversion_report, convert, subscribe


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# dynamo's own, where a compiled piece is called on activations
not_a_leaf = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@not_a_leaf
@pytest.mark.parametrize("whole", [True, False])
def test_births_and_re_sorts_compile_nothing_anew(whole: bool) -> None:
    """An event comes every six steps, so that hooks are on the layers when the model is compiled and later not."""
    counter = CompileCounter()
    net, eager = Net(), Net()
    settings: dict[str, Any] = {"steep": False, "batch_size": 32}
    optimizer = optimizer_of(net, **settings)
    if whole:
        forward = torch.compile(net, backend=counter, fullgraph=True)
    else:
        forward = net
        for block in net.stack:
            block.compile(backend=counter, fullgraph=True)
    out = train(net, optimizer, forward=forward)
    expected = train(eager, optimizer_of(eager, **settings))
    # Blocks are of one kind and share it; torch 2.6 runs a module of its own that is compiled in place as it is.
    assert counter.frame_count == (0 if torch.__version__.startswith("2.6.") and not whole else 1)
    assert out.resorts == expected.resorts >= 5 and out.born == expected.born > 0
    assert furthest(out, expected) < 1e-4


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools")  # its own, about wrapped functions
@pytest.mark.filterwarnings("ignore:Profiler")
def test_a_compiled_step_moves_and_replaces_what_an_eager_one_does() -> None:
    """Compiled piece by piece, births lost some of their writes (torch 2.15)."""
    ends = []
    for compiled in (False, True):
        net = Net()
        optimizer = optimizer_of(net, steep=False)
        if compiled:
            optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
        ends.append(train(net, optimizer))
    assert ends[0].resorts == ends[1].resorts >= 5 and ends[0].born == ends[1].born > 0
    assert furthest(*ends) < 1e-6


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))


def test_what_a_compiled_model_does_not_show_is_said_once() -> None:
    net = mlp()
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = BirthDeathOptimizer(inner, net, example_input=torch.rand(1, 6), every=5, reinject=0.2)
    forward = torch.compile(net, backend="eager", fullgraph=True)
    events: list[Any] = []
    optimizer.register_event_hook(events.append)
    with pytest.warns(RuntimeWarning) as warned:
        for _ in range(15):
            optimizer.zero_grad()
            forward(torch.rand(4, 6)).square().mean().backward()
            optimizer.step()
    said = sorted(str(w.message) for w in warned)
    assert len(events) == 3 and len(said) == 2
    assert "does not know how many samples a step has" in said[0] and "pass batch_size=" in said[0]
    assert "has seen nothing of the loss" in said[1] and "steep=False" in said[1]


@pytest.mark.parametrize("given", ["compiled", "original", "compiled in place"])
def test_populations_are_found_at_the_first_call_of_a_compiled_model(given: str) -> None:
    net = mlp()
    forward: Any = net
    if given == "compiled in place":
        net.compile(backend="eager", fullgraph=True)
    else:
        forward = torch.compile(net, backend="eager", fullgraph=True)
    model = forward if given == "compiled" else net
    optimizer = BirthDeathOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), model, every=10)
    forward(torch.rand(4, 6)).square().mean().backward()
    optimizer.step()
    assert [p.size for p in optimizer.populations] == [24] and not net._forward_pre_hooks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


@not_a_leaf
def test_blocks_of_a_converted_model_compiled_one_by_one() -> None:
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = convert(nn.Sequential(nn.Linear(4, 6), *(Block() for _ in range(4))), torch.rand(1, 4))
        counter = CompileCounter()
        for block in net[1:5] if compiled else ():
            block.compile(backend=counter, fullgraph=True)
        stage = conversion_report(net).stages[0].module
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        motions: list[Any] = []
        with subscribe(motions.append, model=net):
            for _ in range(10):
                optimizer.zero_grad()
                net(torch.rand(8, 4)).square().mean().backward()
                stage.tau_axis.offset.grad += 4 * torch.randn(4)
                optimizer.step()
        ends.append([p.detach().clone() for p in net.parameters()])
        assert motions and counter.frame_count == (4 if compiled else 0)
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_see_what_moved() -> None:
    """``reduce-overhead`` replays recorded kernels on the addresses they were recorded with."""
    nets = [Net().cuda() for _ in range(2)]
    settings: dict[str, Any] = {"steep": False, "batch_size": 32}
    forward = torch.compile(nets[0], mode="reduce-overhead")
    out, expected = (
        train(net, optimizer_of(net, **settings), forward=f) for net, f in zip(nets, (forward, nets[1]), strict=True)
    )
    assert out.resorts == expected.resorts > 0 and out.born == expected.born > 0
    assert furthest(out, expected) < 1e-2
