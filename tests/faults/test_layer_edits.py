"""A layer whose branches or places are edited by hand runs what it says, or says what it cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

from torch_meanfield import MeanFieldSequential, conversion_report, convert, resort_

Z = torch.linspace(-1, 1, 24).view(4, 6)


def branch() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))


def layer(**settings: Any) -> Any:
    torch.manual_seed(0)
    return MeanFieldSequential(branch(), branch(), branch(), **settings)


def euler(stack: Any, steps: tuple[float, ...], x: Tensor = Z) -> Tensor:
    for f, step in zip(stack, steps, strict=True):
        x = x + step * f(x)
    return x


# -- branches ---------------------------------------------------------------------------------------------------------

EDITS: dict[str, Any] = {
    "add_module": lambda m: m.add_module("3", branch()),
    "register_module": lambda m: m.register_module("3", branch()),
    "setattr": lambda m: setattr(m, "3", branch()),
    "another name": lambda m: setattr(m, "extra", nn.Linear(6, 6)),
    "delattr": lambda m: delattr(m, "2"),
    "delattr in the middle": lambda m: delattr(m, "1"),
    "none": lambda m: setattr(m, "1", None),
    "append": lambda m: m.append(branch()),
    "insert": lambda m: m.insert(0, branch()),
    "extend": lambda m: m.extend([branch()]),
    "pop": lambda m: m.pop(2),
    "del": lambda m: m.__delitem__(2),
}


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("event", ["forward", "resort_", "set_tau_"])
@pytest.mark.parametrize("name", EDITS)
def test_a_branch_that_was_added_or_removed_is_an_error(name: str, event: str, learn: bool) -> None:
    stack = layer(learn_tau=learn)
    events = {"forward": lambda: stack(Z), "resort_": lambda: resort_(stack), "set_tau_": lambda: stack.set_tau_(TAU)}
    with pytest.raises(RuntimeError, match=r"keeps the 3 branches .*MeanFieldSequential\(\*branches\)"):
        EDITS[name](stack)
        events[event]()


def test_a_branch_may_be_replaced_by_one_of_its_kind() -> None:
    stack, new = layer(), branch()
    stack.add_module("1", new)
    torch.testing.assert_close(stack(Z), euler([stack[0], new, stack[2]], (1.0, 1.0, 1.0)))


# -- places -----------------------------------------------------------------------------------------------------------

TAU = [0.5, 1.0, 1.5]
WRITES: dict[str, Any] = {
    "place_": lambda axis: axis.place_(torch.tensor(TAU)),
    "place_ of a list": lambda axis: axis.place_(TAU),
    "copy_": lambda axis: axis.anchor.copy_(torch.tensor(TAU)),
    "data": lambda axis: axis.anchor.data.mul_(0.5),
    "setattr": lambda axis: setattr(axis, "anchor", torch.tensor(TAU)),
}


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("horizon", [None, 1.5])
@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("name", WRITES)
def test_places_written_by_hand_act(name: str, used: bool, horizon: float | None, learn: bool) -> None:
    stack = layer(learn_tau=learn, horizon=horizon)
    if used:
        stack(Z)
    WRITES[name](stack.tau_axis)
    steps = tuple(stack.steps().tolist())
    assert horizon is not None or steps == (0.5, 0.5, 0.5)
    torch.testing.assert_close(stack(Z), euler(stack, steps))


@pytest.mark.parametrize(("values", "message"), [([1.0, 2.0], "3 positions"), ([1.0, float("nan"), 2.0], "finite")])
def test_places_that_are_none_are_refused(values: list[float], message: str) -> None:
    stack = layer()
    with pytest.raises(ValueError, match=message):
        stack.tau_axis.place_(values)
    assert stack.tau.tolist() == [1.0, 2.0, 3.0]


# -- errors that name the block and the way out -----------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.f, self.wrap = nn.Linear(6, 6), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.f(x))


@pytest.mark.parametrize("settings", [{}, {"learn_tau": False}])
@pytest.mark.parametrize("wrap", [lambda t: (t, None), lambda t: {"out": t}, lambda t: [t], lambda t: None])
def test_a_branch_that_returns_no_tensor_is_named(wrap: Any, settings: Any) -> None:
    stack = MeanFieldSequential(Pair(lambda t: t), Pair(wrap), **settings)
    with pytest.raises(TypeError, match=r"branch 1 \(Pair\) must return one tensor, got a .*; wrap it"):
        stack(Z)


class Adapter(nn.Module):
    """PEFT's wrapper."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.lora = base, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.lora(x)
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g: nn.Module = nn.Linear(6, 6)
        self.h = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.h(self.g(x).relu())
        return out


def wrapped(block: Any) -> None:
    name = "g" if isinstance(block, Block) else "2"
    setattr(block, name, Adapter(getattr(block, name)))


def beside(block: Any) -> None:
    block.adapter = nn.Linear(6, 6)


def normed(block: Any) -> None:
    parametrizations.weight_norm(block.g if isinstance(block, Block) else block[2])


def buffered(block: Any) -> None:
    last = block.g if isinstance(block, Block) else block[2]
    bias = last.bias
    del last.bias
    last.register_buffer("bias", bias.detach())


SOME: dict[str, Any] = {"adapter": wrapped, "beside": beside, "weight norm": normed, "frozen": buffered}


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("kind", ["layer", "converted"])
@pytest.mark.parametrize("name", SOME)
def test_what_was_done_to_some_blocks_only_is_named_when_they_would_cross(name: str, kind: str, which: int) -> None:
    if kind == "layer":
        model = stack = layer()
        blocks = list(stack)
    else:
        model = convert(nn.Sequential(*(Block() for _ in range(3))), Z)
        stack = conversion_report(model).stages[0].module
        blocks = list(model)
    SOME[name](blocks[which])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"in block [12] and .*in block 0; .*do to each of them.*or undo it"):
        stack.set_tau_([3.0, 2.0, 1.0])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for i, block in enumerate(blocks):
        if i != which:
            SOME[name](block)
    stack.set_tau_([3.0, 2.0, 1.0])


def test_one_frozen_norm_among_others_is_named() -> None:
    """As torchvision's and timm's ``freeze_batch_norm_2d`` make it."""

    def conv() -> nn.Sequential:
        return nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))

    stack = MeanFieldSequential(conv(), conv(), conv())
    stack[1][0] = FrozenBatchNorm2d(3)  # type: ignore[index]
    with pytest.raises(ValueError, match=r"'0.weight' is a buffer of a FrozenBatchNorm2d in block 1"):
        stack.set_tau_([3.0, 2.0, 1.0])
