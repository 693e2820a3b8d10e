"""Constants that differ from place to place and travel with the particles: normaliser-free blocks."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_meanfield import conversion_report, convert, fold, resort_, set_automatic_resort
from torch_meanfield.observe import private_copy


class Standardised(nn.Conv2d):
    """A convolution with weight standardisation and a gain, as in NFNets."""

    def __init__(self, a, b, side=3):
        super().__init__(a, b, side, padding=side // 2)
        self.gain = nn.Parameter(torch.rand(b, 1, 1, 1) + 0.5)

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, (self.gain * 0.3).view(-1), training=True, momentum=0.0)
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


class FreeBlock(nn.Module):
    def __init__(self, width, beta):
        super().__init__()
        self.conv1, self.conv2 = Standardised(width, width, 1), Standardised(width, width)
        self.alpha, self.beta = 0.2, beta

    def forward(self, x):
        out = F.silu(x) * self.beta
        return self.conv2(F.silu(self.conv1(out))) * self.alpha + x


class LinearBlock(nn.Module):
    """Two plain layers read the scaled activation."""

    def __init__(self, width, beta):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(width, width) for _ in range(3))
        self.beta = beta

    def forward(self, x):
        h = torch.tanh(x).mul(self.beta)
        return x + self.c(self.a(h).relu() * self.b(h).sigmoid())


class Net(nn.Module):
    def __init__(self, build, depth=4, width=4):
        super().__init__()
        self.blocks = nn.Sequential(*(build(width, (1 + 0.04 * i) ** -0.5) for i in range(depth)))

    def forward(self, x):
        return self.blocks(x)


BLOCKS = {"free": (FreeBlock, (2, 4, 5, 5)), "linear": (LinearBlock, (3, 4))}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_constant_goes_where_its_block_goes(name):
    build, shape = BLOCKS[name]
    model, x = Net(build), torch.randn(shape)
    plain = copy.deepcopy(model)
    convert(model, x)
    (stage,) = [s.module for s in conversion_report(model)]
    assert len(stage) == 4 and torch.equal(model(x), plain(x))
    stage.set_tau_([0.6, 1.5, 2.0, 3.3])
    before = model(x)
    set_automatic_resort(model, False)
    with torch.no_grad():
        stage.tau_axis.offset[0] += 1.2  # past the second
    order, steps = [1, 0, 2, 3], [1.5, 0.3, 0.2, 1.3]
    expected = x  # what the blocks compute, each with its own constant, in the order of tau
    for i, step in zip(order, steps, strict=True):
        expected = expected + step * (plain.blocks[i](expected) - expected)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)  # unsorted
    resort_(model)
    assert stage.carried.home.tolist() == order
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert [b.beta for b in model.blocks] == [b.beta for b in plain.blocks] and not torch.allclose(before, expected)

    folded = fold(model)
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5)
    fresh = Net(build)
    fresh.load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(fresh(x), folded(x))

    again = convert(Net(build), x)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    for twin in (copy.deepcopy(model), torch.load(_saved(model), weights_only=False)):
        assert torch.equal(twin(x), model(x))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_gradients_and_training():
    model, x = convert(Net(FreeBlock), torch.randn(2, 4, 5, 5)), torch.randn(2, 4, 5, 5)
    (stage,) = [s.module for s in conversion_report(model)]
    optimizer = torch.optim.SGD([{"params": model.parameters(), "lr": 0.05, "momentum": 0.9}])
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        stage.tau_axis.offset.grad[0] = -8.0
        optimizer.step()
    assert sorted(stage.carried.home.tolist()) == [0, 1, 2, 3] and stage.carried.home[0] != 0
    assert bool(model(x).isfinite().all())


def test_a_plain_checkpoint_in_a_moved_model_says_so():
    x = torch.randn(3, 4)
    model, plain = convert(Net(LinearBlock), x), Net(LinearBlock)
    model.load_state_dict(plain.state_dict(), strict=True)
    (stage,) = [s.module for s in conversion_report(model)]
    stage.set_tau_([2.0, 1.0, 3.0, 4.0])
    with pytest.warns(RuntimeWarning, match="carry constants"):
        model.load_state_dict(plain.state_dict(), strict=True)
    stage.carried.reset_parameters()
    assert stage.carried.home.tolist() == [0, 1, 2, 3]


def test_made_on_the_meta_device_all_are_at_home():
    with torch.device("meta"):
        model = convert(Net(LinearBlock), torch.empty(3, 4))
    model.to_empty(device="cpu")
    (stage,) = [s.module for s in conversion_report(model)]
    assert stage.carried.home.tolist() == [0, 1, 2, 3] and not stage.carried.has_moved()


class Sandwiched(LinearBlock):
    """The constant stands before a nonlinearity that no parameter undoes."""

    def forward(self, x):
        return x + self.c((self.a(x) * self.beta).tanh())


class Twice(LinearBlock):
    """The parameter that would make up for it is read once more."""

    def forward(self, x):
        return x + self.c(self.a(x * self.beta).relu()) + 0 * self.a.weight.sum()


@pytest.mark.parametrize("build", [Sandwiched, Twice])
def test_a_constant_that_no_parameter_makes_up_for_forbids(build):
    model = Net(build)
    with pytest.raises(ValueError, match="at 'beta' it has 1.0"):
        convert(model, torch.randn(3, 4))
    assert len(conversion_report(convert(model, torch.randn(3, 4), ignore="beta"))) == 1
    assert not any("carried" in name for name in model.state_dict())


def test_timms_nfnets():
    timm = pytest.importorskip("timm")
    model = timm.create_model("nfnet_l0", num_classes=3).eval()
    with torch.no_grad():
        for block in model.modules():
            if getattr(block, "skipinit_gain", None) is not None:
                block.skipinit_gain.fill_(0.7)
    x = torch.randn(1, 3, 64, 64)
    before = private_copy(model)(x)
    report = conversion_report(convert(model, x))
    assert report.particles == 7 and torch.equal(model(x), before)
