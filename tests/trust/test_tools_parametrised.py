"""Weights that are computed from others: normalised, orthogonal, pruned, fake-quantised, or by the user's own code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as spectral_norm_hook
from torch.nn.utils import weight_norm as weight_norm_hook

from tests.depth.reference import ReferenceNet
from tools.faults.digits import differences
from torch_meanfield import BirthDeathOptimizer, MeanFieldSequential, conversion_report, convert, fold
from torch_meanfield.particles import Slice
from torch_meanfield.width import Neurons, find_populations, verify
from torch_meanfield.width.search.reparametrised import Reparametrised

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max"),  # torch's, of its own default
]


class Centred(nn.Module):
    """Mixes rows: every unit's weights depend on all units'."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean(0, keepdim=True)


class FakeQuantisedRows(nn.Module):
    """A user's rounding with a scale for each row, straight through."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.01, 0.05, rows)[:, None])

    def forward(self, weight: Tensor) -> Tensor:
        scale: Tensor = self.scale  # type: ignore[assignment]
        return weight + ((weight / scale).round() * scale - weight).detach()


def own(module: nn.Module, parametrization: nn.Module) -> nn.Module:
    parametrize.register_parametrization(module, "weight", parametrization)
    return module


def pruned(module: nn.Module) -> nn.Module:
    out: nn.Module = prune.random_unstructured(module, "weight", 0.3)
    return out


WAYS: dict[str, Callable[[Any], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm, hook": weight_norm_hook,
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm, hook": spectral_norm_hook,
    "orthogonal": parametrizations.orthogonal,
    "pruned": pruned,
    "centred": lambda m: own(m, Centred()),
    "rows rounded": lambda m: own(m, FakeQuantisedRows(m.out_features)),
}


# -- depth: whatever a block is made of moves with it ---------------------------------------------------------------


def blocks_of(way: Callable[[Any], nn.Module], seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), way(nn.Linear(6, 6))) for _ in range(4)]


def against_the_reference(stack: Any, reference: Any, steps: int = 40) -> None:
    """Train both with pushes that make blocks cross; then every tensor of every particle must be where it belongs."""
    assert stack.state_dict().keys() >= {f"{i}.{k}" for i in range(4) for k in reference.branches[i].state_dict()}
    optimizers = []
    for net in (stack, reference):
        tau = net.tau_axis.offset if net is stack else net.offset
        weights = [p for p in net.parameters() if p is not tau]
        optimizers.append(torch.optim.AdamW([{"params": weights}, {"params": [tau], "lr": 0.1}], lr=1e-2))
    generator = torch.Generator().manual_seed(0)
    push = 3 * torch.randn(steps // 5, 4, generator=generator).repeat_interleave(5, 0)
    for t in range(steps):
        x = torch.randn(8, 6, generator=generator)
        for net, optimizer in zip((stack, reference), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
        stack.tau_axis.offset.grad += push[t][reference.order]
        reference.offset.grad += push[t]
        for optimizer in optimizers:
            optimizer.step()
        reference.sort()
    assert reference.crossings >= 4
    for place, i in enumerate(reference.order):
        ours, theirs = stack[place].state_dict(), reference.branches[i].state_dict()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4, msg=f"{place} {key}")
    x = torch.randn(5, 6, generator=generator)
    torch.testing.assert_close(stack.eval()(x), reference.eval()(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", WAYS)
def test_blocks_change_places_with_all_that_their_weights_are_computed_from(name: str) -> None:
    stack = MeanFieldSequential(*blocks_of(WAYS[name], 0), horizon=1.0)
    twins = blocks_of(WAYS[name], 1)
    for twin, block in zip(twins, stack, strict=True):
        twin.load_state_dict(block.state_dict())
    against_the_reference(stack, ReferenceNet(twins, stack.tau_axis.anchor))


def quantised(net: nn.Module) -> nn.Module:
    from torch.ao import quantization

    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.qconfig = quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    return quantization.prepare_qat(net.train())  # type: ignore[no-any-return]


def test_blocks_change_places_with_their_observers_in_quantisation_aware_training() -> None:
    stack = MeanFieldSequential(*blocks_of(lambda m: m, 0), horizon=1.0)
    reference = ReferenceNet(blocks_of(lambda m: m, 0), stack.tau_axis.anchor)
    stack, reference = quantised(stack), quantised(reference)
    observed = stack[0][2].weight_fake_quant  # type: ignore[index,union-attr]
    stack(torch.randn(4, 6)), reference(torch.randn(4, 6))
    assert observed.scale.shape == (6,)  # one for each unit
    torch.manual_seed(0)
    for i, block in enumerate(stack):  # what the first passes have seen differs
        reference.branches[i].load_state_dict(block.state_dict())
    against_the_reference(stack, reference)


# -- width: units are replaced one at a time, or the reason why not is given -------------------------------------------


def mlp(first: Callable[[Any], nn.Module], last: Callable[[Any], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(first(nn.Linear(6, 16)), nn.ReLU(), last(nn.Linear(16, 3)))


def plain(module: Any) -> nn.Module:
    return module  # type: ignore[no-any-return]


X = torch.linspace(-1, 1, 24).view(4, 6)


@pytest.mark.parametrize("name", ["weight norm", "rows rounded"])
def test_births_keep_the_function_where_units_are_apart(name: str) -> None:
    net = mlp(WAYS[name], plain).double()
    inner = torch.optim.SGD(net.parameters(), lr=1e-3)
    x = X.double()
    optimizer = BirthDeathOptimizer(inner, net, example_input=x, every=2, reinject=0.3, rate=0.0)
    (population,) = optimizer.populations
    held = {id(t) for t in net[0].parametrizations.parameters()}  # type: ignore[union-attr,arg-type]
    assert held <= {id(c.tensor) for c in population.columns}  # type: ignore[union-attr]
    assert verify(net, x, [population])[0].proven  # type: ignore[list-item]
    born: list[Tensor] = []
    with torch.no_grad():
        others = [p.clone() for p in net.parameters()]
    optimizer.register_event_hook(lambda event: born.append(event.born))
    for _ in range(2):
        net(x).square().mean().backward()
        optimizer.step()
    (places,) = born
    # as if the units that died had been taken away, and nobody born
    expected = net[0](x).relu()
    expected[:, places] = 0
    torch.testing.assert_close(net(x), nn.functional.linear(expected, net[2].weight, net[2].bias))  # type: ignore[arg-type]
    fresh = net[0].weight[places]  # type: ignore[index]
    assert bool(fresh.isfinite().all()) and bool((fresh.norm(dim=1) > 0).all())
    assert any(not torch.equal(a, b) for a, b in zip(others, net.parameters(), strict=True))


REFUSED = {
    "weight norm, last": ("", "weight norm", "2.weight is computed by WeightNorm"),
    "weight norm of the whole, first": (
        "whole",
        "",
        "0.weight is computed by WeightNorm, in which units are not independent",
    ),
    "spectral norm, first": ("spectral norm", "", "0.parametrizations.weight.original: meets vdot"),
    "spectral norm, last": ("", "spectral norm", "2.weight is computed by SpectralNorm"),
    "spectral norm hook, last": (
        "",
        "spectral norm, hook",
        r"2.weight is computed by SpectralNorm \(a hook of torch.nn",
    ),
    "orthogonal, first": ("orthogonal", "", "0.weight is computed by Orthogonal, in which units are not independent"),
    "centred, first": ("centred", "", "0.weight is computed by Centred, in which units are not independent"),
    "centred, last": ("", "centred", "2.weight is computed by Centred"),
    "pruned, first": ("pruned", "", r"hooks of torch.nn.utils \(weight_norm, spectral_norm, prune\) keep such"),
    "weight norm hook": (
        "weight norm, hook",
        "",
        r"hooks of torch.nn.utils .* torch.nn.utils.parametrizations does not",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_units_that_a_birth_would_mix_are_refused_by_name(case: str) -> None:
    first, last, message = REFUSED[case]
    ways = {**WAYS, "": plain, "whole": lambda m: parametrizations.weight_norm(m, dim=None)}
    net = mlp(ways[first], ways[last])
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=message):
        BirthDeathOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net, example_input=X)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_the_rest_is_kept_and_what_is_left_out_is_said() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 9), nn.ReLU(), parametrizations.weight_norm(nn.Linear(9, 3))
    )
    with pytest.warns(UserWarning, match=r"leaves out.*2.weight \(9 units\): its outgoing weight 4.weight"):
        optimizer = BirthDeathOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net, example_input=X)
    assert [p.size for p in optimizer.populations] == [8]


def test_declared_units_are_held_to_the_same() -> None:
    net = mlp(WAYS["spectral norm"], plain)
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    original = net[0].parametrizations.weight.original  # type: ignore[union-attr]
    slices = [(original, 0), (net[0].bias, 0), (net[2].weight, 1)]
    with pytest.raises(ValueError, match="0.weight is computed by SpectralNorm, in which units are not independent"):
        BirthDeathOptimizer(inner, net, populations=slices)  # type: ignore[arg-type]
    computed = [(net[0].weight, 0), (net[0].bias, 0), (net[2].weight, 1)]
    for model in (net, None):
        with pytest.raises(ValueError, match="no tensor of its own but computed from others"):
            BirthDeathOptimizer(inner, model, populations=computed)  # type: ignore[arg-type]


@pytest.mark.parametrize("called", [False, True])
def test_the_weight_that_a_hook_leaves_behind_is_no_weight(called: bool) -> None:
    """Before the first call it is a bare alias of the parameter: without a history, and yet not what is trained."""
    net = mlp(WAYS["spectral norm, hook"], plain)
    if called:
        net(X)
    slices = [(net[0].weight, 0), (net[0].bias, 0), (net[2].weight, 1)]
    with pytest.raises(ValueError, match="computed from others .* or a view of one"):
        BirthDeathOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), populations=slices)  # type: ignore[arg-type]


def test_a_parametrization_registered_later_is_noticed_at_the_next_event() -> None:
    net = mlp(plain, plain)
    optimizer = BirthDeathOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.1), net, example_input=X, every=2, batch_size=4, reinject=0.2
    )
    parametrizations.weight_norm(net[2])
    net(X).square().mean().backward()
    optimizer.step()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="'2.weight' is no longer the tensor that the optimizer trains"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_quantisation_aware_training_is_refused_in_width_and_kept_in_depth() -> None:
    stack = MeanFieldSequential(*blocks_of(plain, 0))
    net = quantised(nn.Sequential(stack, nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    net(X)
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="rounds by a fake quantiser, .*FakeQuantize"):
        find_populations(net, X)
    slices = [(net[1].weight, 0), (net[1].bias, 0), (net[3].weight, 1)]  # type: ignore[index,union-attr]
    with pytest.raises(ValueError, match="rounds by a fake quantiser, .*, whose scale the units share"):
        BirthDeathOptimizer(inner, net, populations=slices)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="leaves out.*all neurons: .*FakeQuantize"):
        optimizer = BirthDeathOptimizer(inner, net, example_input=X)
    assert [p.name for p in optimizer.populations] == ["0 (blocks)"]


def test_quantisation_aware_training_comes_after_the_conversion() -> None:
    prepared = quantised(nn.Sequential(*(Block(plain) for _ in range(4))))
    before = copy.deepcopy(prepared.state_dict())
    with pytest.raises(ValueError, match=r"rounds by a fake quantiser, .*FakeQuantize.*then fold\(model\)"):
        convert(prepared, X)
    assert differences(before, prepared.state_dict()) == []
    model = nn.Sequential(*(Block(plain) for _ in range(4)))
    convert(model, X)
    quantised(copy.deepcopy(model))(X)  # tests/faults/test_scaled_layers.py: the step acts on what it puts in
    quantised(fold(model, X))(X)


def test_symbolic_tracing_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"order of its blocks .*torch.fx.symbolic_trace"):
        torch.fx.symbolic_trace(MeanFieldSequential(*blocks_of(plain, 0)))


class Rounded(nn.Linear):
    """A layer of the user's that rounds its weight by one scale for each unit."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("scale", torch.linspace(0.01, 0.05, outputs))

    def forward(self, x: Tensor) -> Tensor:
        step: Tensor = self.scale[:, None]  # type: ignore[index]
        weight = self.weight + ((self.weight / step).round() * step - self.weight).detach()
        return nn.functional.linear(x, weight, self.bias)


def test_scales_of_a_users_own_layer_move_with_their_units() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Rounded(6, 16), nn.ReLU(), nn.Linear(16, 3))
    (population,) = find_populations(net, X)
    assert any(c.tensor is net[0].scale for c in population.own)
    without = [c for c in population.columns if c.tensor is not net[0].scale]  # type: ignore[union-attr]
    part = Neurons(without, [r for r in population.roles if r != "own"], net, "without its scales")
    assert not verify(net, X, [part])[0].proven


def test_apart_is_what_a_change_of_one_unit_leaves_in_the_others() -> None:
    """The plain reference: change one unit after another and look at the others."""
    for name in ("weight norm", "rows rounded", "spectral norm", "centred", "orthogonal"):
        net = mlp(WAYS[name], plain).eval()
        computed = net[0].parametrizations.weight  # type: ignore[union-attr]
        rows = {t.shape[0] == 16 for t in computed.parameters()}  # type: ignore[union-attr]
        tensors = [t for t in computed.parameters() if t.shape[:1] == (16,)]  # type: ignore[union-attr]
        tensors += [t for t in computed.buffers() if t.shape == (16, 1)]  # type: ignore[union-attr]
        apart = rows == {True}
        with torch.no_grad():
            for unit in range(16):
                before = computed()  # type: ignore[operator]
                kept = [t[unit].clone() for t in tensors]
                for t in tensors:
                    t[unit] = torch.randn(t[unit].shape)
                others = torch.arange(16) != unit
                apart = apart and torch.equal(computed()[others], before[others])  # type: ignore[operator]
                for t, value in zip(tensors, kept, strict=True):
                    t[unit] = value
        columns = [Slice(t) for t in tensors] + [Slice(net[2].weight, 1)]  # type: ignore[arg-type]
        units = Neurons(columns, ["in"] * len(tensors) + ["out"], net)
        assert (Reparametrised(net).entangled(units) is None) == apart, name
        assert apart == (name in ("weight norm", "rows rounded"))


# -- conversion -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, way: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), way(nn.Linear(6, 12)), way(nn.Linear(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


@pytest.mark.parametrize("name", ["weight norm", "spectral norm", "orthogonal"])
def test_a_conversion_folds_no_computed_weight_but_scales_its_output(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), *(Block(WAYS[name]) for _ in range(4))).eval()
    before = net(X)
    with pytest.raises(
        ValueError, match=r"1: .*(_weight_norm stands behind|vdot reads|stands behind).*parametrizations"
    ):
        convert(net, X)
    assert torch.equal(net(X), before)
    net = convert(net, X, foldable=False)
    assert torch.equal(net(X), before)
    stage: Any = conversion_report(net).stages[0].module
    state = [{k: v.clone() for k, v in b.state_dict().items()} for b in net[1:]]  # type: ignore[index]
    index = [2, 0, 3, 1]
    stage.set_tau_([2.0, 4.0, 1.0, 3.0])
    for place, i in enumerate(index):
        theirs = net[1 + place].state_dict()  # type: ignore[index]
        assert all(torch.equal(theirs[k], v) for k, v in state[i].items() if "tau" not in k)
    with pytest.raises(ValueError):
        fold(net)
