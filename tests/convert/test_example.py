"""The input that a model is looked at with when none is given."""

import pytest
import torch
from torch import nn

from tests.convert.networks import CifarResNet, images
from torch_meanfield import conversion_report, convert
from torch_meanfield.convert.example_input import example_for, noise


def _configured(**attributes):
    model = CifarResNet()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def test_an_input_that_is_given_is_taken_as_it_is():
    x = images()
    assert example_for(nn.Linear(2, 2), x, "convert") is x


@pytest.mark.parametrize(
    "attributes, shape",
    [
        ({"pretrained_cfg": {"input_size": (3, 8, 8)}}, (1, 3, 8, 8)),
        ({"default_cfg": {"input_size": (3, 8, 12)}}, (1, 3, 8, 12)),
        ({"pretrained_cfg": {"input_size": (3, 8, 8)}, "in_chans": 1}, (1, 1, 8, 8)),
        ({"pretrained_cfg": {"input_size": (3, 8, 8)}, "patch_embed": nn.Identity()}, (1, 3, 8, 8)),
    ],
)
def test_the_size_is_read_off_a_timm_configuration(attributes, shape):
    example = example_for(_configured(**attributes), None, "convert")
    assert example.shape == shape and torch.equal(example, example_for(_configured(**attributes), None, "convert"))


def test_a_model_built_for_another_size_says_so():
    embedding = nn.Identity()
    embedding.img_size = (16, 16)
    model = _configured(pretrained_cfg={"input_size": (3, 8, 8)}, patch_embed=embedding)
    assert example_for(model, None, "convert").shape == (1, 3, 16, 16)


def test_a_configured_model_is_converted_without_an_example():
    torch.manual_seed(0)
    model, x = _configured(pretrained_cfg={"input_size": (3, 8, 8)}).eval(), images()
    before = model(x)
    convert(model)
    assert conversion_report(model).stages
    torch.testing.assert_close(model(x), before)


def test_what_cannot_be_known_is_asked_for():
    with pytest.raises(ValueError, match="convert: example_input is needed, since Linear has no timm configuration"):
        example_for(nn.Linear(2, 2), None, "convert")
    bare = nn.ReLU()
    bare.pretrained_cfg = {"input_size": (3, 8, 8)}
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        example_for(bare, None, "convert")


def test_numbers_are_like_the_parameters_and_leave_no_trace():
    state = torch.get_rng_state()
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.int8, torch.float32),
    ):
        x = noise(torch.Size((2, 3)), torch.zeros(1, dtype=dtype))
        assert x.dtype == expected and x.shape == (2, 3) and x.any()
    assert noise(torch.Size((2, 3)), torch.zeros(1, device="meta")).is_meta
    assert torch.equal(torch.get_rng_state(), state)
