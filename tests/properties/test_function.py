"""What must not change a network's function: permutations of units, sorting, folding; over random networks."""

from __future__ import annotations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.convert.networks import stack, tokens
from tests.properties.strategies import SEEDS, bits
from torch_meanfield import MeanFieldSequential, convert, find_populations, fold, resort_, transport_
from torch_meanfield.convert.stage import stages_of

ACTIVATIONS = (nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    """A small perceptron or convolutional network in any of the layouts, and an input."""
    torch.manual_seed(draw(SEEDS))
    widths = draw(st.lists(st.integers(2, 6), min_size=2, max_size=4))
    act, dtype = draw(st.sampled_from(ACTIVATIONS)), draw(st.sampled_from(sorted(TOLERANCE, key=str)))
    if draw(st.booleans()):
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [
                nn.Linear(a, b, bias=draw(st.booleans())),
                *draw(st.sampled_from(([], [nn.BatchNorm1d(b)]))),
                act(),
            ]
        return nn.Sequential(*layers, nn.Linear(widths[-1], 3)).to(dtype), torch.randn(2, widths[0], dtype=dtype)
    layers = []
    for a, b in zip(widths, widths[1:], strict=False):
        groups = a if draw(st.booleans()) else 1  # a depthwise convolution before the next one
        layers += [nn.Conv2d(a, a, 3, padding=1, groups=a), act()] if groups > 1 else []
        layers += [nn.Conv2d(a, b, 1), nn.BatchNorm2d(b), act()]
    net = nn.Sequential(*layers, nn.Conv2d(widths[-1], 3, 1)).to(dtype)
    if draw(st.booleans()):
        net = net.to(memory_format=torch.channels_last)
    return net, torch.randn(2, widths[0], 4, 4, dtype=dtype)


@given(networks(), st.data())
def test_a_permutation_of_any_population_that_is_found_changes_no_output(
    drawn: tuple[nn.Module, torch.Tensor], data: st.DataObject
) -> None:
    net, x = drawn
    found = find_populations(net, x).populations
    assume(found)  # with two units and a ReLU, all may be silent on the example, and nothing can be proven
    net.eval()
    with torch.no_grad():
        before = net(x)
        for population in found:
            transport_(population, data.draw(st.permutations(range(population.size))))
        after = net(x)
    bound = TOLERANCE[x.dtype] * float(before.abs().max())
    torch.testing.assert_close(after, before, rtol=0, atol=bound)


@st.composite
def residual_stacks(draw: st.DrawFn) -> MeanFieldSequential:
    """Branches with parameters and buffers, at random times; not sorted."""
    torch.manual_seed(draw(SEEDS))
    n, width = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    kind = draw(st.sampled_from(("linear", "norm")))
    branches = [nn.Sequential(nn.Linear(width, width), *([nn.BatchNorm1d(width)] * (kind == "norm"))) for _ in range(n)]
    layer = MeanFieldSequential(*branches, horizon=draw(st.floats(0.5, 8)), learn_tau=draw(st.booleans()))
    times = st.one_of(st.floats(-1, 10, width=32), st.sampled_from((0.0, 1.0)))  # ties and negative ones among them
    tau = torch.tensor(draw(st.lists(times, min_size=n, max_size=n)), dtype=torch.float32)
    offset = layer.position()
    with torch.no_grad():
        (layer.tau_axis.anchor if offset is None else offset).copy_(
            tau - (0 if offset is None else layer.tau_axis.anchor)
        )
    layer.tau_axis.unit_steps = False  # written by hand
    layer.tau_axis.mark_sorted(False)
    return layer.double() if draw(st.booleans()) else layer


@given(residual_stacks())
def test_sorting_keeps_the_function_and_twice_is_once(layer: MeanFieldSequential) -> None:
    layer.eval()
    x = torch.randn(3, layer[0][0].in_features).to(layer[0][0].weight.dtype)
    before = layer(x)
    resort_(layer)
    once = {k: bits(v) for k, v in layer.state_dict().items()}
    tau = layer.tau_axis.read()
    assert bool((tau.diff() >= 0).all()) and bool((tau >= 0).all())
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    resort_(layer)
    assert {k: bits(v) for k, v in layer.state_dict().items()} == once


@given(residual_stacks())
def test_a_checkpoint_of_a_stack_goes_round(layer: MeanFieldSequential) -> None:
    resort_(layer)
    n, width, dtype = len(layer), layer[0][0].in_features, layer[0][0].weight.dtype
    branches = [nn.Sequential(nn.Linear(width, width), *(type(m)(width) for m in list(layer[0])[1:])) for _ in range(n)]
    other = MeanFieldSequential(*branches, horizon=layer.horizon, learn_tau=layer.position() is not None).to(dtype)
    other.load_state_dict(layer.state_dict())
    assert {k: bits(v) for k, v in other.state_dict().items()} == {k: bits(v) for k, v in layer.state_dict().items()}
    x = torch.randn(2, width, dtype=dtype)
    assert torch.equal(other.eval()(x), layer.eval()(x))


@settings(max_examples=max(4, settings.default.max_examples // 3))
@given(st.sampled_from(("linear", "relu", "gate", "gain", "sum", "minus")), st.integers(2, 4), st.data(), SEEDS)
def test_folding_a_converted_model_keeps_its_function(kind: str, n: int, data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = stack(n, kind=kind).double().eval(), tokens().double()
    convert(model, x)
    (stage,) = stages_of(model).values()
    stage.set_tau_(data.draw(st.lists(st.floats(0, 4, width=32), min_size=n, max_size=n)))
    plain = fold(model)
    fresh = stack(n, kind=kind).double().eval()
    fresh.load_state_dict(plain.state_dict())
    with torch.no_grad():
        converted = model(x)
        bound = 1e-12 * float(converted.abs().max())
        torch.testing.assert_close(plain(x), converted, rtol=0, atol=bound)
        torch.testing.assert_close(fresh(x), converted, rtol=0, atol=bound)
