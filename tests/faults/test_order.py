"""Whatever writes tau: no step is negative, blocks execute in the order of tau, and the next step re-sorts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from torch_meanfield import MeanFieldSequential, conversion_report, convert, fold, resort_, set_automatic_resort

Z = torch.linspace(-1, 1, 24).view(4, 6)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(6, 6), nn.Linear(6, 6)

    def branch(self, h: Tensor) -> Tensor:
        out: Tensor = self.g(self.f(h).relu())
        return out

    def forward(self, h: Tensor) -> Tensor:
        return h + self.branch(h)


class Branch(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, h: Tensor) -> Tensor:
        return self.block.branch(h)


KINDS = ["layer", "converted", "two blocks a slot"]


def made(kind: str) -> tuple[nn.Module, Any]:
    """A model of three particles, and its mean-field layer."""
    torch.manual_seed(0)
    if kind == "layer":
        stack = MeanFieldSequential(*(Branch(Block()) for _ in range(3)))
        return stack, stack
    if kind == "converted":
        model = nn.Sequential(*(Block() for _ in range(3)))
    else:
        wide = [Block() for _ in range(6)]
        for block in wide[1::2]:
            block.f, block.g = nn.Linear(6, 9), nn.Linear(9, 6)
        model = nn.Sequential(*wide)
    model = convert(model, Z)
    return model, conversion_report(model).stages[0].module


def particles(kind: str) -> list[list[Block]]:
    """The plain blocks of each particle."""
    model, stage = made(kind)
    blocks = [b for b in (model if kind == "layer" else fold(model)).modules() if isinstance(b, Block)]
    size = len(blocks) // 3
    return [blocks[size * i : size * (i + 1)] for i in range(3)]


def reference(kind: str, tau: Tensor, x: Tensor = Z) -> Tensor:
    """Eq. (15): the particles in the order of their times, which are projected to [0, inf)."""
    plain, time = particles(kind), tau.detach().clamp(min=0)
    before = 0.0
    for i in time.argsort(stable=True).tolist():
        for block in plain[i]:
            x = x + (float(time[i]) - before) * block.branch(x)
        before = float(time[i])
    return x


def by_vector(layer: Any, model: nn.Module) -> None:
    """As `scipy` fits, evolution strategies and pymoo-like tools write all parameters."""
    vector = parameters_to_vector(model.parameters()).detach().clone()
    place = next(
        i for i, v in enumerate(torch.cat([torch.full_like(p, float(p is layer.tau_axis.offset)).flatten()
                                           for p in model.parameters()]).tolist()) if v
    )  # fmt: skip
    vector[place] += 5
    vector_to_parameters(vector, model.parameters())


def by_data(layer: Any, model: nn.Module) -> None:
    layer.tau_axis.offset.data[0] += 5


def below_zero(layer: Any, model: nn.Module) -> None:
    layer.tau_axis.offset.data.copy_(torch.tensor([-4.0, 0.0, 1.0]))


def other_storage(layer: Any, model: nn.Module) -> None:
    layer.tau_axis.offset.data = torch.tensor([5.0, 0.0, 0.0])


def through_numpy(layer: Any, model: nn.Module) -> None:
    layer.tau_axis.offset.detach().numpy()[0] += 5


def in_no_grad(layer: Any, model: nn.Module) -> None:
    with torch.no_grad():
        layer.tau_axis.offset[0] += 5


def anchored(layer: Any, model: nn.Module) -> None:
    layer.tau_axis.anchor.data.copy_(torch.tensor([3.0, 1.0, 2.0]))


WRITES = {f.__name__: f for f in (by_vector, by_data, below_zero, other_storage, through_numpy, in_no_grad, anchored)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRITES)
def test_however_tau_is_written_its_order_is_that_of_execution(name: str, kind: str, training: bool) -> None:
    model, layer = made(kind)
    model.train(training)
    model(Z)
    before = layer.tau_axis.read()
    WRITES[name](layer, model)
    tau = layer.tau_axis.read()
    assert not torch.equal(tau, before) and bool((layer.steps() >= 0).all())
    expected = reference(kind, tau)
    torch.testing.assert_close(model(Z), expected)
    torch.testing.assert_close(copy.deepcopy(model)(Z), expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(Z).sum().backward()
    optimizer.step()
    assert layer.tau_axis.read().tolist() == sorted(tau.clamp(min=0).tolist())
    torch.testing.assert_close(model(Z), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_with_automatic_resorting_off_blocks_execute_in_the_order_of_tau(kind: str) -> None:
    model, layer = made(kind)
    set_automatic_resort(model, False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    layer.tau_axis.offset.grad = torch.tensor([-1.5, 0.0, 0.25])
    optimizer.step()
    tau = layer.tau_axis.read()
    assert tau.tolist() == [2.5, 2.0, 2.75]
    expected = reference(kind, tau)
    torch.testing.assert_close(model(Z), expected)
    gradients = torch.autograd.grad(model(Z).square().sum(), list(model.parameters()))
    where = {id(p): g for p, g in zip(model.parameters(), gradients, strict=True)}
    taus = where[id(layer.tau_axis.offset)]
    weights = {id(p): torch.nn.Parameter(p.detach()) for p in model.parameters()}
    assert weights and bool((taus != 0).all())
    motion = resort_(model)[0]
    torch.testing.assert_close(model(Z), expected)
    again = torch.autograd.grad(model(Z).square().sum(), layer.tau_axis.offset)[0]
    torch.testing.assert_close(again, taus[motion.index])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_training_in_eval_mode_re_sorts_like_training(kind: str, optimizer_class: Any) -> None:
    """Fine-tuning with frozen norms: ``model.eval()``, then the ordinary loop."""
    taus = []
    for training in (True, False):
        model, layer = made(kind)
        model.train(training)
        weights = [p for p in model.parameters() if p is not layer.tau_axis.offset]
        optimizer = optimizer_class([{"params": weights}, {"params": [layer.tau_axis.offset], "lr": 0.5}], lr=1e-2)
        crossings = []
        for _ in range(6):
            optimizer.zero_grad()
            model(Z).square().mean().backward()
            layer.tau_axis.offset.grad = torch.tensor([-1.0, 0.0, 1.0])  # the first slot towards the last
            before = layer.tau_axis.anchor.clone()
            optimizer.step()
            crossings.append(not torch.equal(before, layer.tau_axis.anchor))
            assert bool((layer.tau_axis.read().diff() >= 0).all())
        assert any(crossings)
        taus.append(layer.tau_axis.read())
    assert torch.equal(*taus)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_compiled_model_takes_no_negative_step(kind: str) -> None:
    model, layer = made(kind)
    torch.compiler.reset()  # what other tests have compiled counts
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(Z)
    layer.tau_axis.offset.data.copy_(torch.tensor([4.0, -3.0, 1.0]))  # tau = 5, -1, 4: by slot steps of 1, 0, 4
    x = Z
    for (block,), step in zip(particles(kind), (1.0, 0.0, 4.0), strict=True):
        x = x + step * block.branch(x)
    torch.testing.assert_close(compiled(Z), x)


def test_a_model_in_bfloat16_keeps_its_tau_in_float32() -> None:
    """``vector_to_parameters`` gives every parameter the type of the vector, as it does in any model of two types."""
    model, layer = made("layer")
    model.bfloat16()
    vector_to_parameters(parameters_to_vector(model.parameters()), model.parameters())
    model.bfloat16()
    assert {p.dtype for p in model.parameters() if p is not layer.tau_axis.offset} == {torch.bfloat16}
    assert layer.tau_axis.offset.dtype == torch.float32
