"""A conversion changes no bit of outputs and gradients, and no name."""

import copy

import pytest
import torch
from torch import nn

from tests.convert.networks import CifarResNet, PlainViT, images, stack, tokens
from torch_meanfield import conversion_report, convert

CASES = {
    "cifar": (CifarResNet, images),
    "vit": (lambda: PlainViT(drop=0.1), images),
    **{k: (lambda k=k: stack(kind=k), tokens) for k in ("linear", "relu", "gate", "gain", "sum", "minus")},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_keep_every_bit(case, training):
    build, example = CASES[case]
    torch.manual_seed(0)
    model, x = build(), example()
    plain = copy.deepcopy(model)
    assert convert(model, x) is model
    results = []
    for m in (plain, model):
        m.train(training)
        torch.manual_seed(1)
        y = m(x)
        y.square().sum().backward()
        results.append(y.detach())
    assert torch.equal(*results)
    theirs = dict(model.named_parameters())
    for name, p in plain.named_parameters():
        assert (p.grad is None and theirs[name].grad is None) or torch.equal(p.grad, theirs[name].grad), name
    with torch.no_grad():  # inference has kernels of its own
        assert torch.equal(plain.eval()(x), model.eval()(x))


def test_names_types_and_hooks_stay():
    torch.manual_seed(0)
    model, x = PlainViT(), images()
    before = {n: type(m).__name__ for n, m in model.named_modules()}
    keys = list(model.state_dict())
    fired = []
    model.layers[1].think[2].register_forward_hook(lambda m, a, out: fired.append(out.shape))
    convert(model, x)
    assert fired == []  # the search runs a copy without the user's hooks
    model(x)
    assert fired == [(2, 4, 16)]
    names = {n: type(m).__name__ for n, m in model.named_modules()}
    assert {n: names[n] for n in before} == before
    assert isinstance(model.layers[0].think[2], nn.Linear)
    assert [k for k in model.state_dict() if k in keys] == keys
    assert [k for k in model.state_dict() if k not in keys] == [
        f"mean_field_layers.tau_axis.{k}" for k in ("offset", "anchor")
    ]


def test_what_one_reads_and_writes_outside_of_forward_is_the_parameter_itself():
    torch.manual_seed(0)
    model, x = stack(), tokens()
    weight = model.body[1].outer.weight
    convert(model, x)
    stage = conversion_report(model).stages[0].module
    stage.set_tau_([2.0, 4.0, 6.0, 8.0])
    last = model.body[1].outer
    assert last.weight is weight and dict(last.named_parameters())["weight"] is weight
    model(x)
    assert last.weight is weight
    with torch.no_grad():
        before = model(x)
        last.weight.mul_(2.0)
        assert not torch.equal(model(x), before)


def test_a_failing_forward_pass_leaves_the_parameters_visible():
    model = stack()
    convert(model, tokens())
    with pytest.raises(RuntimeError):
        model.body[0].outer(torch.randn(2, 7))
    assert "weight" not in model.body[0].outer.__dict__


def test_the_step_multiplies_every_branch_of_a_block():
    torch.manual_seed(0)
    model, x = PlainViT(depth=2).eval(), images()
    plain = copy.deepcopy(model)
    convert(model, x)
    steps = torch.tensor([0.7, 1.9])
    conversion_report(model).stages[0].module.set_tau_(steps.cumsum(0))
    h = plain.cut(x).flatten(2).transpose(1, 2) + plain.where
    for layer, step in zip(plain.layers, steps, strict=True):
        n = layer.a(h)
        h = h + step * layer.look(n, n, n, need_weights=False)[0]
        h = h + step * layer.think(layer.b(h))
    torch.testing.assert_close(model(x), plain.out(h.mean(1)))


@pytest.mark.parametrize("kind", ["relu", "gate", "gain", "sum", "minus"])
def test_the_step_multiplies_the_branch_whatever_stands_behind_its_last_affine_layer(kind):
    torch.manual_seed(0)
    model, x = stack(3, kind=kind).double(), tokens().double()
    plain = copy.deepcopy(model)
    convert(model, x)
    steps = torch.tensor([0.25, 1.5, 3.0], dtype=torch.float64)
    conversion_report(model).stages[0].module.set_tau_(steps.cumsum(0))
    h = plain.enter(x)
    for block, step in zip(plain.body, steps, strict=True):
        h = h + step * (block(h) - h)
    torch.testing.assert_close(model(x), plain.leave(h), rtol=1e-12, atol=1e-12)


def test_half_precision_multiplies_in_float32_and_rounds_once():
    torch.manual_seed(0)
    model, x = stack(2), tokens()
    convert(model, x)
    conversion_report(model).stages[0].module.set_tau_([0.7, 1.4])
    model.to(torch.bfloat16)
    outer = model.body[0].outer
    expected = (outer.weight.float() * 0.7).bfloat16()
    h = torch.randn(3, 6, dtype=torch.bfloat16)
    bias = (outer.bias.float() * 0.7).bfloat16()
    assert torch.equal(outer(h), nn.functional.linear(h, expected, bias))
    assert conversion_report(model).stages[0].module.tau.dtype == torch.float32


def test_the_horizon_scales_the_grid():
    model = convert(stack(), tokens(), horizon=1.0)
    stage = conversion_report(model).stages[0].module
    assert stage.horizon == 1.0 and stage.steps().tolist() == [0.25] * 4
