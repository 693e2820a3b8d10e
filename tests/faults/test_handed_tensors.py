"""Tensors that a model hands to its blocks by place: they do not move with a block, so they must be one for all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torch_meanfield import conversion_report, convert


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, rope: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        h = self.f(x)
        h = h if rope is None else h * rope
        h = h if mask is None else h + mask
        return x + self.g(h.relu())


class Model(nn.Module):
    """Hands to each of its blocks what a subclass says."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.tables = torch.rand(3, 6)
        self.learned = nn.Parameter(torch.ones(3, 6))
        self.register_buffer("table", torch.rand(6))
        self.conditions = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        for condition in self.conditions:
            nn.init.zeros_(condition.weight)
            nn.init.zeros_(condition.bias)
        self.condition = nn.Linear(6, 6)

    def handed(self, i: int, x: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for i, block in enumerate(self.blocks):
            x = block(x, **self.handed(i, first))
        return x


class Buffers(Model):
    def handed(self, i, x):
        return {"rope": self.tables[i]}


class Learned(Model):
    """Equal at the start, trained apart."""

    def handed(self, i, x):
        return {"rope": self.learned[i]}


class LearnedThenComputed(Model):
    def handed(self, i, x):
        return {"rope": self.learned[i].exp()}


class Conditioned(Model):
    """By modules of the model, one for each place, that begin at zero."""

    def handed(self, i, x):
        return {"mask": self.conditions[i](x)}


class Computed(Model):
    def handed(self, i, x):
        return {"mask": x * i}


class Pair(Model):
    def handed(self, i, x):
        return {"rope": self.table, "mask": self.tables[i] if i else self.tables[2]}


class Shared(Model):
    def handed(self, i, x):
        return {"rope": self.table}


class EqualTables(Model):
    def __init__(self) -> None:
        super().__init__()
        self.tables = torch.ones(3, 6)

    def handed(self, i, x):
        return {"rope": self.tables[i]}


class MadeAnew(Model):
    def handed(self, i, x):
        return {"rope": self.table.cos(), "mask": self.condition(x)}


@pytest.mark.parametrize("kind", [Buffers, Learned, LearnedThenComputed, Conditioned, Computed, Pair])
def test_blocks_that_are_handed_other_tensors_do_not_change_places(kind):
    torch.manual_seed(0)
    model = kind()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"forward\.(rope|mask)"):
        convert(model, torch.randn(4, 6))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", [Shared, EqualTables, MadeAnew])
def test_what_is_one_for_all_forbids_nothing(kind):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(4, 6)
    expected = model(x)
    convert(model, x)
    assert len(conversion_report(model).stages[0].particles) == 3
    assert torch.equal(model(x), expected)


def test_on_the_meta_device_what_is_not_known_to_be_one_forbids_an_exchange():
    with torch.device("meta"):
        models = [Buffers(), Learned(), EqualTables(), Shared(), MadeAnew()]
        x = torch.randn(4, 6)
    for model in models[:3]:
        with pytest.raises(ValueError, match=r"forward\.rope"):
            convert(model, x)
    for model in models[3:]:
        assert len(conversion_report(convert(model, x)).stages[0].particles) == 3


@pytest.mark.parametrize("kind", [Buffers, Conditioned])
def test_an_argument_that_is_named_may_stay_at_its_place(kind):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(4, 6)
    expected = model(x)
    convert(model, x, ignore=("rope", "mask"))
    assert torch.equal(model(x), expected)


class TwoStreams(nn.Module):
    """Both run along: what the first block takes comes from outside, the others' from the block before."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x + self.g((self.f(x) + y).relu()), y.tanh()

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()
        for block in self.blocks:
            x, y = block(x, y)
        return x


def test_what_runs_along_with_the_stream_is_no_context():
    torch.manual_seed(0)
    model = convert(TwoStreams(), torch.randn(4, 6))
    assert len(conversion_report(model).stages[0].particles) == 3
