"""Folding gives a plain model back."""

import copy

import pytest
import torch

from tests.convert.networks import CifarResNet, PlainViT, images, stack, tokens
from torch_meanfield import conversion_report, convert, fold
from torch_meanfield.convert.sites import site_of
from torch_meanfield.convert.stage import ConvertedStage

CASES = {
    "cifar": (CifarResNet, images),
    "vit": (PlainViT, images),
    **{k: (lambda k=k: stack(kind=k), tokens) for k in ("linear", "relu", "gate", "gain", "sum", "minus")},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_a_plain_model_loads_the_folded_weights_and_gives_the_same_outputs(case, dtype, bound):
    build, example = CASES[case]
    torch.manual_seed(0)
    model, x = build().to(dtype), example().to(dtype)
    convert(model, x)
    for stage in conversion_report(model):
        stage.module.set_tau_((torch.rand(len(stage.module)) + 0.5).cumsum(0))
    model.train()
    model(x)  # moves running statistics
    before = copy.deepcopy(model.state_dict())
    folded = fold(model)
    fresh = build().to(dtype).eval()
    fresh.load_state_dict(folded.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(fresh(x), model.eval()(x), rtol=bound, atol=bound)
    assert 0 <= conversion_report(folded).fold_error <= bound
    assert folded.training and not any(isinstance(m, ConvertedStage) or site_of(m) for m in folded.modules())
    assert [type(m) for m in folded.modules()] == [type(m) for m in fresh.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "num_batches" not in k)


def test_steps_of_zero_fold_too():
    torch.manual_seed(0)
    model, x = stack(3, kind="gate").eval(), tokens()
    convert(model, x)
    conversion_report(model).stages[0].module.set_tau_([0.0, 1.0, 1.0])
    plain = fold(model)
    assert torch.isfinite(plain(x)).all()
    torch.testing.assert_close(plain(x), model(x))


def test_the_error_in_bfloat16_is_measured_and_reported():
    torch.manual_seed(0)
    model, x = stack(3), tokens()
    convert(model, x)
    conversion_report(model).stages[0].module.set_tau_([0.7, 1.8, 3.3])
    model.bfloat16()
    folded = fold(model, x.bfloat16())
    assert conversion_report(folded).fold_error == 0.0  # the run-time weights are rounded alike
    assert "folded with a relative error" in str(conversion_report(folded))


def test_a_folded_model_can_be_converted_again():
    model = convert(stack(), tokens())
    again = convert(fold(model), tokens())
    assert conversion_report(again).fold_error is None and len(conversion_report(again)) == 1
