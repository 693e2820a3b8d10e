"""Layers that all blocks of a run share, as the position encoding of CoaT: they belong to no particle."""

import copy

import pytest
import torch
from torch import nn

from torch_meanfield import BirthDeathOptimizer, conversion_report, convert, fold, resort_


class Block(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.shared, self.norm, self.f, self.g = shared, nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.g(self.f(self.shared(self.norm(x))).relu())


class Positions(Block):
    """What the shared layer adds itself is part of the stream."""

    def forward(self, x):
        x = x + self.shared(x)
        return x + self.g(self.f(self.norm(x)).relu())


class Weight(Block):
    """A parameter, not a module, is what they share."""

    def __init__(self, shared):
        super().__init__(shared)
        self.f.weight = self.shared.weight
        self.g = nn.Linear(6, 6)
        self.f.bias = nn.Parameter(torch.randn(6))


class Net(nn.Module):
    def __init__(self, build, elsewhere=True):
        super().__init__()
        shared = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(build(shared) for _ in range(3))
        self.first = shared if elsewhere else nn.Linear(6, 6)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("build", [Block, Positions, Weight])
@pytest.mark.parametrize("elsewhere", [True, False])
def test_what_all_blocks_share_stays_where_it_is(build, elsewhere):
    model, x = Net(build, elsewhere), torch.randn(3, 6)
    plain = copy.deepcopy(model)
    convert(model, x)
    (report,) = conversion_report(model)
    stage = report.module
    assert len(stage) == 3 and report.branches == 1 and torch.equal(model(x), plain(x))
    held = {id(t) for column in stage.population().columns for t in column.tensors}
    assert not held & {id(p) for p in model.blocks[0].shared.parameters()}

    stage.set_tau_([0.7, 1.5, 2.6])
    folded = fold(model)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    assert folded.blocks[0].shared.weight is folded.blocks[2].shared.weight

    before = [block.g.weight.detach().clone() for block in model.blocks]
    shared = model.blocks[0].shared.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(x).sum().backward()
    optimizer.step()
    with torch.no_grad():
        stage.tau_axis.offset[0] += 1.0
    resort_(model, optimizer)
    after = [block.g.weight for block in model.blocks]
    assert all(torch.equal(after[i], before[j]) for i, j in enumerate([1, 0, 2]))
    assert torch.equal(model.blocks[1].shared.weight, shared)


def test_births_and_deaths_of_blocks_leave_it_alone():
    model, x = convert(Net(Positions), torch.randn(3, 6)), torch.randn(3, 6)
    optimizer = BirthDeathOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model, example_input=x)
    model(x).square().mean().backward()
    optimizer.step()


def test_what_only_some_blocks_share_is_refused():
    model = Net(Block)
    model.blocks[2].shared = nn.Linear(6, 6)
    with pytest.raises(ValueError, match="it shares its parameter 'shared.weight' with '"):
        convert(model, torch.randn(3, 6))


def test_a_step_cannot_act_on_it():
    class Last(Block):
        def forward(self, x):
            return x + self.shared(self.f(self.norm(x))[..., :6])

    with pytest.raises(ValueError, match="is not inside the block|is read outside of the block"):
        convert(Net(Last), torch.randn(3, 6))
