"""State of particles that transport does not know: it moves, or is refused or named at the first step."""

from __future__ import annotations

import copy
import gc
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_meanfield import BirthDeathOptimizer, MeanFieldSequential, conversion_report, convert, follow
from torch_meanfield.particles.averages import lineage_of
from torch_meanfield.particles.holders import Census, held_by_optimizers, holders_of


def _branch() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))


def _layer() -> MeanFieldSequential:
    torch.manual_seed(0)
    return MeanFieldSequential(*(_branch() for _ in range(3)), horizon=1.0)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.norm, self.g = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.g(self.norm(self.f(h)).relu())


def _converted() -> nn.Sequential:
    torch.manual_seed(0)
    return convert(nn.Sequential(_Block(), _Block(), _Block()), torch.randn(4, 6))


def _stage(model: nn.Module) -> Any:
    return model if isinstance(model, MeanFieldSequential) else conversion_report(model).stages[0].module


def _own(block: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in block.named_parameters() if "tau_axis" not in n]  # the first block of a Sequential has it


def _step(model: nn.Module, optimizer: Any, cross: bool = False) -> None:
    """One step; with ``cross`` the gradient of tau takes the first block past the second one."""
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 48).view(8, 6)).square().mean().backward()
    stage = _stage(model)
    if cross:
        stage.tau_axis.offset.grad.zero_()
        tau = stage.tau_axis.read()
        stage.tau_axis.offset.grad[0] = -1e3 * (tau[1] - tau[0] + 1e-3)
    optimizer.step()


def _sgd(model: nn.Module) -> torch.optim.SGD:
    tau = _stage(model).tau_axis.offset
    rest = [p for p in model.parameters() if p is not tau]
    return torch.optim.SGD([{"params": rest}, {"params": [tau], "lr": 1e-3}], lr=0.05)


# -- optimizers around optimizers, none of which calls Optimizer.__init__ ------------------------------------------


class Lookahead(torch.optim.Optimizer):
    """As torch_optimizer has it."""

    def __init__(self, optimizer: torch.optim.Optimizer, k: int = 2, alpha: float = 0.5) -> None:
        self.optimizer, self.k, self.alpha = optimizer, k, alpha
        self.param_groups, self.fast_state = optimizer.param_groups, optimizer.state
        self.state: Any = defaultdict(dict)
        self.defaults = optimizer.defaults
        for group in self.param_groups:
            group["counter"] = 0

    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        for group in self.param_groups:
            for fast in group["params"] if group["counter"] == 0 else ():
                slow = self.state[fast].setdefault("slow_param", fast.data.clone())
                fast.data.mul_(self.alpha).add_(slow, alpha=1 - self.alpha)
                slow.copy_(fast.data)
            group["counter"] = (group["counter"] + 1) % self.k
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


class StochasticAverage(torch.optim.Optimizer):
    """As torchcontrib's SWA keeps it: averages of the weights, in a state beside that of the optimizer inside."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups, self.opt_state = optimizer.param_groups, optimizer.state
        self.state: Any = defaultdict(dict)
        self.n = 0

    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p].setdefault("swa_buffer", torch.zeros_like(p)).lerp_(p.data, 1 / (self.n + 1))
        self.n += 1
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


class SharpnessAware(torch.optim.Optimizer):
    """As davda54's SAM: what it keeps takes the parameter's place in memory."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.base_optimizer = optimizer
        self.param_groups = optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["old_p"] = p.data.clone()
            p.add_(0.01)
        for p in (p for group in self.param_groups for p in group["params"]):
            p.data = self.state[p]["old_p"]
        return self.base_optimizer.step()


@pytest.mark.parametrize("make", [_layer, _converted])
@pytest.mark.parametrize("wrap", [Lookahead, StochasticAverage, SharpnessAware])
def test_the_state_of_an_optimizer_around_the_optimizer_moves_from_the_first_crossing_on(
    wrap: Any, make: Callable[[], nn.Module]
) -> None:
    """As if blocks had been called by their names: what each particle's state is, at whatever place it stands."""
    model = make()
    optimizer = wrap(_sgd(model))
    stage, first, second = _stage(model), [], []
    _step(model, optimizer)
    blocks = [slot if isinstance(slot, nn.Module) else slot[0] for slot in stage]
    for kept, block in ((first, blocks[0]), (second, blocks[1])):
        kept += [{k: v.clone() for k, v in optimizer.state.get(p, {}).items()} for p in _own(block)]
    weights = [[p.detach().clone() for p in _own(b)] for b in blocks[:2]]
    before = stage.tau_axis.read()
    with torch.no_grad():
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 if stage.tau_axis.offset in set(group["params"]) else 0.0
            if "counter" in group:
                group["counter"] = 1  # no interpolation at this step
    if wrap is StochasticAverage:
        optimizer.n = 10**12  # nor a new term of the average
    _step(model, optimizer, cross=True)
    assert not torch.equal(stage.tau_axis.read(), before)
    for block, source, kept in ((blocks[0], 1, second), (blocks[1], 0, first)):
        for p, weight, state in zip(_own(block), weights[source], kept, strict=True):
            assert torch.equal(p, weight)
            for key, value in state.items() if wrap is not SharpnessAware else ():
                torch.testing.assert_close(optimizer.state[p][key], value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kept", [[torch.zeros(2)], {"lr_max": torch.zeros(2)}])
def test_state_that_cannot_be_divided_is_refused_at_the_first_step(kept: Any) -> None:
    """SOAP, Kron and AggMo keep lists and dicts; the blocks have not crossed."""

    class Kronecker(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for p in (p for group in self.param_groups for p in group["params"]):
                self.state[p]["Q"] = kept
            return super().step(closure)

    model = _layer()
    with pytest.raises(TypeError, match="Kronecker keeps 'Q'"):
        _step(model, Kronecker(model.parameters(), lr=1e-3))


# -- averages ------------------------------------------------------------------------------------------------------


class ListEma:
    """torch_ema's ExponentialMovingAverage and diffusers' EMAModel."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow_params: Any = [p.clone().detach() for p in model.parameters()]

    @torch.no_grad()
    def step(self, model: nn.Module) -> None:
        for s, p in zip(self.shadow_params, model.parameters(), strict=True):
            s.sub_(0.1 * (s - p))


class DictEma:
    """The class of countless training scripts; its tensors are new at every update."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {n: p.data.clone() for n, p in model.named_parameters() if p.requires_grad}

    def step(self, model: nn.Module) -> None:
        for n, p in model.named_parameters():
            self.shadow[n] = 0.9 * self.shadow[n] + 0.1 * p.data


class BufferEma(nn.Module):
    """LitEma of latent diffusion: buffers of a module of its own, behind two numbers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.register_buffer("decay", torch.tensor(0.9))
        for n, p in model.named_parameters():
            self.register_buffer(n.replace(".", "_"), p.clone().detach())


class CopyEma:
    """YOLO's ModelEMA, MoCo's momentum encoder: a frozen deep copy."""

    def __init__(self, model: nn.Module) -> None:
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)


class MasterWeights(torch.optim.SGD):
    """Lists of lists, as optimizers keep weights of higher precision or slow ones."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=1e-3)
        self.slow_weights = [[p.clone().detach() for p in group["params"]] for group in self.param_groups]


class ByParameter:
    def __init__(self, model: nn.Module) -> None:
        self.shadow = {p: p.detach().clone() for p in model.parameters()}

    def update(self) -> None:
        for p, average in self.shadow.items():
            average.lerp_(p.detach(), 0.1)


@pytest.mark.parametrize("make", [_layer, _converted])
@pytest.mark.parametrize(
    ("average", "named"),
    [
        (ListEma, "ListEma.shadow_params"),
        (DictEma, "DictEma.shadow"),
        (BufferEma, "BufferEma._buffers"),
        (CopyEma, "CopyEma.ema"),
        (MasterWeights, "MasterWeights.slow_weights"),
        (ByParameter, "ByParameter.shadow"),
    ],
)
def test_an_average_that_does_not_move_is_named_at_the_first_step(
    average: Any, named: str, make: Callable[[], nn.Module]
) -> None:
    model = make()
    kept = average(model)
    optimizer = _sgd(model)
    with pytest.warns(RuntimeWarning, match=f"{named} .*follow"):
        _step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _step(model, optimizer)  # asked once
    assert kept is not None


def test_what_is_no_average_is_not_named() -> None:
    """A network of the same shapes that trains by itself, a snapshot in a variable, a state dict, gradients."""
    model, twin = _layer(), _layer()
    before = [p.detach().clone() for p in model.parameters()]

    class Trainer:
        networks = [twin]
        parameters = list(model.parameters())

        def __init__(self) -> None:
            self.copy, self.state, self.theirs = copy.deepcopy(model), model.state_dict(), list(twin.parameters())

        def fit(self) -> None: ...

    @dataclass
    class Result:
        weights: dict[str, Tensor]

    trainer = Trainer()
    result = Result({n: p.detach().clone() for n, p in twin.named_parameters()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _step(model, _sgd(model))
    assert len(before) == len(trainer.theirs) == len(result.weights)


@pytest.mark.parametrize("make", [_layer, _converted])
@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize(
    ("average", "tensors"),
    [(ListEma, lambda e: e.shadow_params), (DictEma, lambda e: e.shadow)],
)
def test_an_average_of_tensors_follows(
    average: Any, tensors: Any, replaced: bool, make: Callable[[], nn.Module]
) -> None:
    """Each entry goes on averaging the particle that it averaged; also where ``to()`` makes a new list."""
    model = make()
    ema = average(model)
    assert follow(tensors(ema), model) == len(list(model.parameters()))
    if replaced:
        name = "shadow_params" if average is ListEma else "shadow"
        old = getattr(ema, name)
        setattr(ema, name, [t.double() for t in old] if isinstance(old, list) else dict(old))
    stage = _stage(model)
    blocks = [slot if isinstance(slot, nn.Module) else slot[0] for slot in stage]
    names = {id(p): i for i, p in enumerate(model.parameters())}
    optimizer = _sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _step(model, optimizer)
    ema.step(model)
    values = list(tensors(ema).values()) if isinstance(tensors(ema), dict) else tensors(ema)
    before = [v.clone() for v in values]
    _step(model, optimizer, cross=True)
    values = list(tensors(ema).values()) if isinstance(tensors(ema), dict) else tensors(ema)
    for place, source in ((0, 1), (1, 0), (2, 2)):
        for p, q in zip(_own(blocks[place]), _own(blocks[source]), strict=True):
            assert torch.equal(values[names[id(p)]], before[names[id(q)]])
    tau = names[id(stage.tau_axis.offset)]
    assert torch.equal(values[tau], before[tau][[1, 0, 2]])


def test_the_average_of_units_takes_newborn_ones_over() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    ema = ListEma(net)
    with torch.no_grad():
        net[0].bias[3] = -100.0  # dormant
    units = [(net[0].weight, 0), (net[0].bias, 0), (net[2].weight, 1)]
    optimizer = BirthDeathOptimizer(torch.optim.SGD(net.parameters(), lr=0.01), net, populations=[units], every=2)
    follow(ema.shadow_params, net)
    born: list[Tensor] = []
    optimizer.register_event_hook(lambda event: born.append(event.born))
    for _ in range(4):
        optimizer.zero_grad()
        net(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
        if born:
            break
    assert 3 in born[0]
    assert torch.equal(ema.shadow_params[1][3], net[0].bias[3]) and torch.equal(
        ema.shadow_params[0][3], net[0].weight[3]
    )


def test_the_wrapper_names_an_average_of_its_units() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    units = [(net[0].weight, 0), (net[0].bias, 0), (net[2].weight, 1)]
    optimizer = BirthDeathOptimizer(torch.optim.SGD(net.parameters(), lr=0.01), net, populations=[units])
    ema = ListEma(net)
    net(torch.randn(16, 4)).square().mean().backward()
    with pytest.warns(RuntimeWarning, match=r"ListEma\.shadow_params .*follow"):
        optimizer.step()
    assert len(ema.shadow_params) == 4


def test_follow_refuses_tensors_that_do_not_match() -> None:
    model = _layer()
    tensors = [p.detach().clone() for p in model.parameters()]
    for wrong in (tensors[:-1], tensors[::-1], {str(i): t for i, t in enumerate(tensors[1:])}, [], [1, 2]):
        with pytest.raises(ValueError, match="follow: copy holds .* in number and shape"):
            follow(wrong, model)
    with pytest.raises(TypeError, match="tensors of model itself"):
        follow(list(model.parameters()), model)
    with pytest.raises(ValueError, match="some particles of MeanFieldSequential and not of others"):
        follow({"0.0.weight": tensors[0]}, model)
    with pytest.raises(TypeError, match="a list or dict of tensors, got str"):
        follow("shadow", model)  # type: ignore[arg-type]


def test_lightnings_stochastic_weight_averaging_moves() -> None:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    model = _layer()
    swa = callbacks.StochasticWeightAveraging(swa_lrs=1e-2)
    swa._average_model = copy.deepcopy(model)  # as its setup() does
    kept = [p.detach().clone() for p in swa._average_model[0].parameters()]
    optimizer = _sgd(model)
    _step(model, optimizer)
    assert lineage_of(swa._average_model).following
    _step(model, optimizer, cross=True)
    assert all(torch.equal(a, b) for a, b in zip(swa._average_model[1].parameters(), kept, strict=True))


# -- what blocks hold beside tensors -------------------------------------------------------------------------------


def test_modes_go_with_their_blocks() -> None:
    model = _converted()
    model[0].norm.eval()  # a frozen norm
    model[0].norm.requires_grad_(False)
    optimizer = _sgd(model)
    _step(model, optimizer)
    mean = model[0].norm.running_mean.clone()
    _step(model, optimizer, cross=True)
    assert [b.norm.training for b in model] == [True, False, True]
    assert torch.equal(model[1].norm.running_mean, mean)
    _step(model, optimizer)
    assert torch.equal(model[1].norm.running_mean, mean) and not model[1].norm.weight.requires_grad


class _Counting(nn.Linear):
    """Holds what is no tensor in ``get_extra_state``, and a tensor that is no buffer."""

    def __init__(self, name: str) -> None:
        super().__init__(6, 6)
        self.history = [name]
        self.largest = torch.full((6,), float(len(name)))

    def get_extra_state(self) -> Any:
        return self.history

    def set_extra_state(self, state: Any) -> None:
        self.history = state


def test_extra_state_and_plain_tensors_go_with_their_blocks() -> None:
    model = MeanFieldSequential(*(_Counting(name) for name in ("a", "bb", "ccc")), horizon=1.0)
    optimizer = _sgd(model)
    _step(model, optimizer, cross=True)
    assert [b.history for b in model] == [["bb"], ["a"], ["ccc"]]
    assert [b.largest[0].item() for b in model] == [2.0, 1.0, 3.0]
    model.resample_(torch.tensor([0, 0, 2]))
    model[0].history.append("changed")
    model[0].largest.zero_()
    assert model[1].history == ["bb"] and model[1].largest[0] == 2.0


def test_extra_state_that_cannot_be_set_is_refused_at_the_first_step() -> None:
    class Given(nn.Linear):
        def get_extra_state(self) -> Any:
            return 1

    model = MeanFieldSequential(*(Given(6, 6) for _ in range(3)), horizon=1.0)
    with pytest.raises(TypeError, match="Given has get_extra_state.. without set_extra_state"):
        _step(model, _sgd(model))


def test_plain_tensors_that_blocks_share_stay_shared() -> None:
    table = torch.ones(3)
    model = _layer()
    for block in model:
        block.table = table
    model.set_tau_([0.9, 0.2, 0.5])
    assert all(block.table is table for block in model)


_HELD = [torch.zeros(2)]  # by the module, and by what looks for it


@pytest.mark.parametrize("look", [Census, lambda: holders_of([_HELD]), held_by_optimizers])
def test_a_tuple_that_is_being_filled_is_not_held_by_the_search(look):
    def slowly():
        yield 1
        look()  # as another thread may at this moment
        yield 2

    gc.disable()  # a collection would hide what is left behind
    try:
        assert tuple(slowly()) == (1, 2)  # a SystemError of the interpreter if anybody refers to it
    finally:
        gc.enable()
