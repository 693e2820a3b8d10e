"""Models whose forward pass needs hooks of their own, and hooks of the user, which no copy must call."""

import functools

import pytest
import torch
from torch import nn

from torch_meanfield import BirthDeathOptimizer, conversion_report, convert, find_populations
from torch_meanfield.convert.small_network import residual_network
from torch_meanfield.observe import private_copy


class Backbone(nn.Module):
    """A residual network whose head reads what a hook has kept."""

    def __init__(self):
        super().__init__()
        self.net = residual_network()
        self.head = nn.Linear(4, 2)
        self.hook_up()

    def forward(self, x):
        self.net(x)
        return self.head(self.kept())


class ByMethod(Backbone):
    """A method of the model, as in torchvision's and timm's feature extractors."""

    def hook_up(self):
        self.features = []
        self.net.blocks.register_forward_hook(self.keep)

    def keep(self, module, args, output):
        self.features[:] = [output]

    def kept(self):
        return self.features[0]


class ByClosure(Backbone):
    """A function made in ``__init__`` that refers to the model, by name as in many a tutorial."""

    def hook_up(self):
        self.activation = {}

        def named(name):
            def hook(module, args, output):
                self.activation[name] = output

            return hook

        self.net.blocks[1].register_forward_hook(named("blocks.1"))
        self.net.blocks[2].register_forward_hook(lambda m, a, o, kept=self.activation: kept.update(last=o))

    def kept(self):
        return self.activation.pop("blocks.1") + self.activation.pop("last")


class ByPartial(Backbone):
    """timm's ``FeatureHooks``: an object of the model, its method with an argument given before."""

    class Hooks:
        def __init__(self):
            self.outputs = {}

        def collect(self, key, module, args, output):
            self.outputs[key] = output

    def hook_up(self):
        self.hooks = self.Hooks()
        self.net.blocks.register_forward_hook(functools.partial(self.hooks.collect, "blocks"))

    def kept(self):
        return self.hooks.outputs.pop("blocks")


class ByPreHook(Backbone):
    """The input of a layer, by keyword, and a hook that changes what comes out."""

    def hook_up(self):
        self.seen = None
        self.net.head.register_forward_pre_hook(self.look, with_kwargs=True)
        self.net.blocks[1].inner.register_forward_hook(self.double)

    def look(self, module, args, kwargs):
        self.seen = args[0]

    def double(self, module, args, output):
        return 2 * output

    def kept(self):
        seen, self.seen = self.seen, None
        return seen


@pytest.mark.parametrize("build", [ByMethod, ByClosure, ByPartial, ByPreHook])
def test_a_models_own_hooks_act_in_the_copy_alone(build):
    model, x = build(), torch.randn(3, 4)
    copy, expected = private_copy(model), model(x)
    model.__dict__.update({k: v for k, v in build().__dict__.items() if k in ("features", "activation", "hooks")})
    torch.testing.assert_close(copy(x), expected)
    for held in ("features", "activation"):
        assert not getattr(model, held, None)


@pytest.mark.parametrize("build", [ByMethod, ByClosure, ByPartial])
def test_models_that_need_their_hooks_are_searched_and_converted(build):
    model, x = build(), torch.randn(3, 4)
    assert [p.name for p in find_populations(model, x)] == [f"net.blocks.{i}.inner.weight" for i in range(3)]
    optimizer = BirthDeathOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    model(x).sum().backward()
    optimizer.step()
    assert len(optimizer.populations) == 3
    expected = model(x)
    convert(model, x)
    assert conversion_report(model).particles >= 2 and torch.equal(model(x), expected)


def test_a_hook_that_changes_one_block_is_part_of_what_it_computes():
    with pytest.raises(ValueError, match="net.blocks.1: it is not exchangeable with net.blocks.0"):
        convert(ByPreHook(), torch.randn(3, 4))


def test_the_users_hooks_are_left_out_and_named_where_they_are_missed():
    heard, kept = [], {}

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = residual_network()

        def forward(self, x):
            return self.net(x) + kept.pop("last")[:, :2]

    model = Reads()
    model.net.blocks.register_forward_hook(lambda m, a, o: kept.update(last=o))
    model.net.blocks[0].register_forward_hook(lambda *a: heard.append(1))
    with pytest.raises(
        ValueError, match="does not run .*KeyError: 'last'.*has not the hooks on net.blocks, net.blocks.0"
    ):
        convert(model, torch.randn(2, 4))
    with pytest.raises(ValueError, match="does not run .*KeyError: 'last'.*must be a method of the model"):
        find_populations(model, torch.randn(2, 4))
    assert not heard


def test_an_input_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="verify: ResidualNetwork does not run on the example_input"):
        find_populations(residual_network(), torch.randn(2, 5))
