"""Who trains what: several optimizers, new ones, frozen and tied blocks."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.trust.tools import Converted, Net, furthest, optimizer_of, train
from torch_meanfield import (
    BirthDeathOptimizer,
    MeanFieldSequential,
    convert,
    param_groups,
    resort_,
    set_automatic_resort,
)


def hidden(net: Net) -> list[tuple[Tensor, int]]:
    first, _, last = net.hidden
    return [(first.weight, 0), (first.bias, 0), (last.weight, 1)]  # type: ignore[list-item]


def layer(**options: Any) -> MeanFieldSequential:
    torch.manual_seed(0)
    return MeanFieldSequential(*(nn.Linear(3, 3) for _ in range(4)), **options)


def push(stack: MeanFieldSequential, by: list[float]) -> None:
    """Gradients that move tau by ``by`` in a step of SGD with learning rate 1, and leave the weights."""
    for p in stack.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    stack.tau_axis.offset.grad = -torch.tensor(by).to(stack.tau_axis.offset)  # type: ignore[union-attr,arg-type]


CROSS = [1.5, 0.0, 0.0, 0.0]  # block 0 goes behind block 1


def snapshot(*things: Any) -> list[Any]:
    return [copy.deepcopy(t.state_dict()) for t in things]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


# -- several optimizers ---------------------------------------------------------------------------------------------


class Both:
    """Two optimizers that step one after the other, the second with births."""

    def __init__(self, first: torch.optim.Optimizer, second: BirthDeathOptimizer) -> None:
        self.first, self.second = first, second
        self._dynamics, self.register_event_hook = second._dynamics, second.register_event_hook

    def zero_grad(self) -> None:
        self.first.zero_grad()
        self.second.zero_grad()

    def step(self) -> None:
        self.first.step()
        self.second.step()

    @property
    def optimizer(self) -> Any:
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"state": {}}


def test_two_optimizers_of_which_one_is_wrapped_do_what_one_does() -> None:
    """The stack in one, everything else in another; block weights and tau have rates of their own."""
    ends = []
    for split in (False, True):
        net = Net()
        tau = net.stack.tau_axis.offset
        blocks = [p for p in net.stack.parameters() if p is not tau]
        rest = [*net.stem.parameters(), *net.hidden.parameters()]
        stack = [{"params": blocks, "lr": 0.02}, {"params": [tau], "lr": 0.1}]
        outside = [{"params": rest, "lr": 0.02}]
        settings: dict[str, Any] = {"populations": hidden(net), "every": 6, "reinject": 0.1, "candidates": 16}
        if split:
            births = BirthDeathOptimizer(torch.optim.SGD(outside, momentum=0.9), net, **settings)
            optimizer: Any = Both(torch.optim.SGD(stack, momentum=0.9), births)
        else:
            optimizer = BirthDeathOptimizer(torch.optim.SGD([*outside, *stack], momentum=0.9), net, **settings)
        out = train(net, optimizer)
        out.ending.pop("state")
        ends.append(out)
    assert ends[0].resorts == ends[1].resorts >= 5 and ends[0].born == ends[1].born > 0
    assert furthest(*ends) == 0.0


def test_a_unit_that_two_optimizers_train_is_refused() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    incoming, outgoing = (torch.optim.SGD(net[i].parameters(), lr=0.1) for i in (0, 2))
    declared: Any = [(net[0].weight, 0), (net[0].bias, 0), (net[2].weight, 1)]
    for inner, missing in ((incoming, r"\(3, 8\)"), (outgoing, r"\(8, 6\)")):
        with pytest.raises(ValueError, match=rf"{missing} along dimension . is not one of the optimizer's parameters"):
            BirthDeathOptimizer(inner, net, populations=declared)
        with pytest.raises(ValueError, match="none of which belongs to the optimizer's parameters as a whole"):
            BirthDeathOptimizer(inner, net, example_input=torch.rand(1, 6))


def test_blocks_divided_among_optimizers_change_places_within_one_and_else_are_refused() -> None:
    """What one optimizer trained would be trained by the other, its momentum lost."""
    stack = layer()
    halves = [
        torch.optim.SGD([*stack[i].parameters(), *stack[i + 1].parameters()], lr=1.0, momentum=0.9) for i in (0, 2)
    ]
    tau = torch.optim.SGD([stack.tau_axis.offset], lr=1.0)  # type: ignore[list-item]
    push(stack, CROSS)
    stack[0].weight.grad.fill_(0.5)  # type: ignore[union-attr,operator]
    for half in halves:
        half.step()
    tau.step()
    assert stack.tau_axis.read().tolist() == [2.0, 2.5, 3.0, 4.0]
    assert halves[0].state[stack[1].weight]["momentum_buffer"].eq(0.5).all()
    before = snapshot(*stack, *halves)
    push(stack, [0.0, 1.0, 0.0, 0.0])
    refused = "particle 2 is trained by SGD, but would move to place 1, .*set_automatic_resort"
    with pytest.raises(ValueError, match=refused):
        tau.step()
    assert same(before, snapshot(*stack, *halves)) and stack.tau_axis.read().tolist() == [2.0, 3.5, 3.0, 4.0]
    anchor = stack.tau_axis.anchor.clone()
    with pytest.raises(ValueError, match=refused):
        stack.set_tau_([1.0, 3.0, 2.0, 4.0])
    with pytest.raises(ValueError, match="particle 1 is trained by SGD"):
        stack.resample_(torch.tensor([0, 1, 1, 3]))
    assert same(before, snapshot(*stack, *halves)) and torch.equal(stack.tau_axis.anchor, anchor)
    set_automatic_resort(stack, False)  # the way out: they stay, and execute in the order of their times
    push(stack, [0.0] * 4)
    tau.step()
    assert stack.tau.tolist() == [2.0, 3.0, 3.5, 4.0]


@pytest.mark.parametrize("alive", [True, False])
def test_an_optimizer_made_anew_in_mid_run(alive: bool) -> None:
    """Whether the old one, with a state of its own, is still there makes no difference."""
    net = Net()
    old = optimizer_of(net, torch.optim.AdamW, steep=False)
    train(net, old, steps=7)  # in the middle between two events
    kept = old if alive else None
    hooks = sum(len(m._forward_hooks) for m in net.modules())
    del old
    gc.collect()
    out = train(net, optimizer_of(net, steep=False), steps=12)
    reference = Net()
    train(reference, optimizer_of(reference, torch.optim.AdamW, steep=False), steps=7)
    torn = {k: v.clone() for k, v in reference.state_dict().items()}
    fresh = Net()
    fresh.load_state_dict(torn)  # a model that never had another optimizer
    expected = train(fresh, optimizer_of(fresh, steep=False), steps=12)
    assert furthest(out, expected) < 1e-6 and out.resorts == expected.resorts > 0 and out.born == expected.born > 0
    assert hooks > 0 and (kept is None or kept.clock == 7)


def test_a_group_added_in_mid_run_is_trained_and_moves_with_its_blocks() -> None:
    net = Net()
    tau = net.stack.tau_axis.offset
    inner = torch.optim.SGD(
        [{"params": [tau], "lr": 0.1}, {"params": [*net.hidden.parameters()], "lr": 0.02}], momentum=0.9
    )
    optimizer = BirthDeathOptimizer(inner, net, populations=hidden(net), every=6, reinject=0.1, candidates=16)
    first = train(net, optimizer, steps=9)
    later = [p for p in (*net.stem.parameters(), *net.stack.parameters()) if p is not tau]
    optimizer.add_param_group({"params": later, "lr": 0.02})
    before = [p.detach().clone() for p in later]
    out = train(net, optimizer, steps=9)
    assert first.resorts > 0 and out.resorts > 0 and first.born > 0 and out.born > 0
    assert not any(torch.equal(a, b) for a, b in zip(before, later, strict=True))
    assert all("momentum_buffer" in optimizer.state[p] for p in later)


@pytest.mark.parametrize("wing", ["depth", "width"])
def test_an_optimizer_with_one_vector_for_all_parameters_is_refused(wing: str) -> None:
    """LBFGS keeps it with its first parameter, which no population here holds."""
    net = nn.Sequential(nn.Linear(3, 3), layer(horizon=1.0), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))
    inner = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)
    optimizer: Any = inner
    if wing == "width":
        declared: Any = [(net[2].weight, 0), (net[2].bias, 0), (net[4].weight, 1)]
        optimizer = BirthDeathOptimizer(inner, net, populations=declared, every=2)
    force = torch.tensor([-3.0, 1.0, 2.0, 3.0])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = net(torch.ones(2, 3)).square().mean()
        loss = loss + (net[1].tau * force).sum() * (wing == "depth")  # type: ignore[operator]
        loss.backward()
        return loss

    with pytest.raises(TypeError, match=r"LBFGS keeps 'd' as one vector for all its parameters \(123 numbers\)"):
        for _ in range(5):
            optimizer.step(closure)


# -- frozen blocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [Net, Converted])
def test_a_frozen_block_moves_frozen_and_is_never_trained(made: type[Net]) -> None:
    net = made()
    blocks = net.stack if made is Net else net.blocks
    mine = [{k for k in b.state_dict() if "tau_axis" not in k} for b in blocks]
    assert all(m == mine[0] for m in mine)
    for name, p in blocks[1].named_parameters():
        p.requires_grad_(name not in mine[1])
    frozen = {k: v.clone() for k, v in blocks[1].state_dict().items() if k in mine[1]}
    optimizer = optimizer_of(net)  # all parameters, frozen ones too
    out = train(net, optimizer, steps=24)
    held = [{k: v for k, v in block.state_dict().items() if k in mine[1]} for block in blocks]
    places = [i for i, theirs in enumerate(held) if same(theirs, frozen)]
    assert len(places) == 1 and places != [1] and out.resorts >= 5
    still = [not any(p.requires_grad for k, p in block.named_parameters() if k in mine[1]) for block in blocks]
    assert still == [i == places[0] for i in range(4)]
    assert out.born > 0  # elsewhere: populations with a frozen parameter rest


def test_a_frozen_block_that_its_optimizer_does_not_hold_is_refused_when_it_would_move() -> None:
    stack = layer()
    stack[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in stack.parameters() if p.requires_grad], lr=1.0, momentum=0.9)
    push(stack, [0.0, 0.0, 1.5, 0.0])  # two trained blocks change places as ever
    optimizer.step()
    assert stack.tau_axis.read().tolist() == [1.0, 2.0, 4.0, 4.5]
    before = snapshot(*stack)
    push(stack, CROSS)
    with pytest.raises(
        ValueError, match=r"give one optimizer the parameters of all particles \(frozen ones take no step"
    ):
        optimizer.step()
    assert same(before, snapshot(*stack))
    optimizer.add_param_group({"params": list(stack[0].parameters())})  # the way out
    resort_(stack)
    assert not stack[1].weight.requires_grad and same(snapshot(stack[1]), before[:1])


def test_a_block_unfrozen_in_mid_run_begins_without_state_and_the_others_keep_theirs() -> None:
    stack = layer()
    stack[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(stack.parameters(), lr=1e-3)
    for p in stack.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    stack[0].requires_grad_(True)
    moments = [copy.deepcopy(optimizer.state.get(b.weight, {})) for b in stack]
    assert not moments[0] and all(moments[1:])
    stack.set_tau_([2.5, 2.0, 3.0, 4.0])
    assert all(
        same(dict(optimizer.state.get(stack[place].weight, {})), dict(moments[i]))
        for place, i in enumerate([1, 0, 2, 3])
    )
    push(stack, [0.0] * 4)
    optimizer.step()
    assert [int(optimizer.state[b.weight]["step"]) for b in stack] == [2, 1, 2, 2]


def test_frozen_times_and_frozen_layers_never_move() -> None:
    net = Net()
    net.stack.tau_axis.requires_grad_(False)
    optimizer = optimizer_of(net)
    net.stack.tau_axis.offset.grad = torch.zeros(4)  # type: ignore[union-attr]
    before = net.stack.tau_axis.read().clone()
    for step in range(12):
        optimizer.zero_grad()
        net(torch.rand(8, 64, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
    assert torch.equal(net.stack.tau_axis.read(), before) and optimizer.clock == 12


# -- tied weights ---------------------------------------------------------------------------------------------------


def test_a_block_tied_to_something_outside_its_layer_is_refused_wherever_the_model_is_seen() -> None:
    """The tensor stays in its place when blocks change places, and the other module would compute with it."""
    net = nn.Sequential(nn.Linear(3, 3), layer())
    net[0].weight = net[1][0].weight  # type: ignore[index]
    for call in (
        lambda: param_groups(net, lr=0.1),
        lambda: resort_(net),
        lambda: set_automatic_resort(net, True),
        lambda: BirthDeathOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net, example_input=torch.rand(1, 3)),
        lambda: BirthDeathOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net, populations=net[1]),
    ):
        with pytest.raises(ValueError, match="0.weight belongs to one of its branches"):
            call()
    shared = nn.Linear(3, 3)
    twins = nn.Sequential(MeanFieldSequential(shared, nn.Linear(3, 3)), MeanFieldSequential(shared, nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="1.0 belongs to one of its branches"):
        param_groups(twins, lr=0.1)
    alias = nn.ModuleList([net[1], net[1]])  # type: ignore[index]
    assert resort_(alias) == []  # the same layer under two names is one


def test_one_module_in_two_blocks_is_refused() -> None:
    block, part = nn.Linear(3, 3), nn.Linear(3, 3)
    for branches in ((block, block), (nn.Sequential(part), nn.Sequential(part))):
        with pytest.raises(ValueError, match=r"branches\[1\] shares '.*weight' with branches\[0\]"):
            MeanFieldSequential(*branches)


class Language(nn.Module):
    """An embedding tied to the output, around a stack and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.stack = nn.Embedding(11, 3), layer(horizon=1.0)
        self.up, self.down = nn.Linear(3, 8), nn.Linear(8, 3)
        self.head = nn.Linear(3, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.down(self.up(self.stack(self.embedding(tokens))).relu()))
        return out


def test_an_embedding_tied_to_the_output_stays_tied_while_blocks_and_units_move() -> None:
    net = Language()
    tokens = torch.arange(11)
    inner = torch.optim.SGD(param_groups(net, lr=0.05), momentum=0.9)
    optimizer = BirthDeathOptimizer(inner, net, example_input=tokens[:2], every=4, reinject=0.2, candidates=8)
    assert [p.size for p in optimizer.populations] == [8, 4]  # no dimension of the table is one
    events: list[Any] = []
    optimizer.register_event_hook(events.append)
    with torch.no_grad():
        table = net.embedding.weight.clone()
    for _ in range(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(tokens), tokens).backward()
        net.stack.tau_axis.offset.grad += 2 * torch.randn(4)  # type: ignore[union-attr,operator]
        optimizer.step()
    assert events and net.head.weight is net.embedding.weight and not torch.equal(net.embedding.weight, table)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def test_a_conversion_leaves_tied_blocks_fixed_and_notices_later_ties() -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(Block() for _ in range(4)), nn.Linear(3, 8))

    net = model()
    net[4].weight = net[0].up.weight  # type: ignore[union-attr]
    from torch_meanfield import conversion_report

    report = conversion_report(convert(net, torch.rand(1, 3)))
    assert "0: it shares its parameter 'up.weight' with '4.weight'" in str(report) and len(report.stages[0].module) == 3
    net = convert(model(), torch.rand(1, 3))
    net[4].weight = net[0].up.weight  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="4.weight belongs to one of its branches"):
        resort_(net)
