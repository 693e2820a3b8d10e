"""Which parameters multiply a branch: found and scaled, or refused with what stands in the way."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.convert.networks import Stack, tokens
from torch_meanfield import conversion_report, convert, fold


class Block(nn.Module):
    """``x + form(block, x)``."""

    def __init__(self, form):
        super().__init__()
        self.inner, self.outer, self.extra = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.gain = nn.LayerNorm(6), nn.Parameter(torch.rand(6) + 0.5)
        self.look = nn.MultiheadAttention(6, 2, batch_first=True)
        self.register_buffer("fixed", torch.rand(6) + 0.5)
        self.form = form

    def forward(self, x):
        return x + self.form(self, x)


def _inside(block, x):
    return torch.tanh(block.inner(x))


SCALABLE = {
    "divided by a constant": lambda b, x: b.outer(_inside(b, x)) / 3.0,
    "divided by a parameter": lambda b, x: b.outer(_inside(b, x)) / b.gain,
    "attention of values": lambda b, x: F.scaled_dot_product_attention(b.inner(x), b.extra(x), b.outer(x)),
    "multi-head attention": lambda b, x: b.look(x, x, x, need_weights=False)[0],
    "norm last": lambda b, x: b.norm(_inside(b, x)),
    "two affine layers added": lambda b, x: b.outer(_inside(b, x)) + b.extra(x),
    "times a buffer": lambda b, x: b.outer(_inside(b, x)) * b.fixed,
    "joined": lambda b, x: torch.cat([b.outer(x)[..., :3], b.extra(x)[..., :3]], -1),
    "gated by what it scales": lambda b, x: (h := b.outer(_inside(b, x))) * torch.sigmoid(b.extra(h)),
    "gated by what it scales and what it does not": lambda b, x: (
        (h := b.outer(x)) * (b.extra(h) + b.inner(x)).sigmoid()
    ),
    "a gain in front of relu": lambda b, x: F.relu(b.outer(x)) * b.gain,
}
REFUSED = {
    "without weights undoes every factor": lambda b, x: F.layer_norm(b.outer(x), (6,)),
    "softmax stands behind": lambda b, x: b.outer(x).softmax(-1),
    "a constant is added behind": lambda b, x: b.outer(x) + 1.0,
    "exp reads a scaled tensor": lambda b, x: (h := b.outer(_inside(b, x))) + b.extra(h.exp()),
    "linear reads a scaled tensor": lambda b, x: (h := b.outer(x)) + b.extra(F.linear(h, x[0, :1].expand(6, 6))),
}


@pytest.mark.parametrize("form", SCALABLE.values(), ids=SCALABLE)
def test_the_fold_is_the_scaled_branch(form):
    torch.manual_seed(0)
    model, x = Stack(*(Block(form) for _ in range(3))).eval(), tokens()
    blocks, before = copy.deepcopy(list(model.body)), model(x)
    convert(model, x)
    (stage,) = conversion_report(model).stages
    assert stage.foldable
    torch.testing.assert_close(model(x), before)
    stage.module.set_tau_([0.5, 2.5, 2.75])
    h = model.enter(x)
    for block, step in zip(blocks, (0.5, 2.0, 0.25), strict=True):
        h = h + step * form(block, h)
    torch.testing.assert_close(model(x), model.leave(h))
    torch.testing.assert_close(fold(model)(x), model.leave(h))


@pytest.mark.parametrize(("reason", "form"), REFUSED.items(), ids=REFUSED)
def test_what_no_parameter_scales_is_refused_with_the_reason(reason, form):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=reason):
        convert(Stack(*(Block(form) for _ in range(3))).eval(), tokens())
