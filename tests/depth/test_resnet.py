import copy

import pytest
import torch
from torch import nn

from torch_meanfield import MeanFieldResNet, prune_depth_

# Parameters of the literature, in millions (He et al. 2016, Xie et al. 2017), and blocks that are particles.
FAMILY = [
    ({"depth": 20}, 0.27, (3, 2, 2)),
    ({"depth": 32}, 0.46, (5, 4, 4)),
    ({"depth": 44}, 0.66, (7, 6, 6)),
    ({"depth": 56}, 0.85, (9, 8, 8)),
    ({"depth": 110}, 1.7, (18, 17, 17)),
    ({"depth": 164, "block": "bottleneck"}, 1.7, (17, 17, 17)),
    ({"depth": 29, "block": "resnext", "cardinality": 8}, 34.4, (2, 2, 2)),
    ({"depth": 29, "block": "resnext", "cardinality": 16}, 68.1, (2, 2, 2)),
]


@pytest.mark.parametrize("config, millions, particles", FAMILY)
def test_sizes_of_the_literature_plus_one_tau_for_each_sortable_block(config, millions, particles):
    with torch.device("meta"):
        model, twin = MeanFieldResNet(**config), MeanFieldResNet(**config, learn_tau=False)
    layers = list(model.mean_field_layers().values())
    assert tuple(len(layer) for layer in layers) == particles
    count = sum(p.numel() for p in model.parameters())
    assert count == sum(p.numel() for p in twin.parameters()) + sum(particles)
    assert count / 1e6 == pytest.approx(millions, rel=0.025)
    if config.get("block", "basic") == "basic":  # the stem, two 3x3 in each block, the classifier
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert len(convs) + 1 == config["depth"]


@pytest.mark.parametrize("block, depth", [("basic", 8), ("basic", 20), ("bottleneck", 11), ("resnext", 11)])
def test_the_vanilla_twin_has_the_same_weights_and_outputs_and_the_same_first_gradients(block, depth):
    nets = []
    for learn_tau in (True, False):
        torch.manual_seed(3)
        nets.append(MeanFieldResNet(depth, 7, 1, block, base_width=4, learn_tau=learn_tau))
    ours, vanilla = nets
    x = torch.randn(4, 1, 16, 16)
    weights = dict(ours.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in vanilla.named_parameters())
    assert torch.equal(ours(x), vanilla(x))
    for net in nets:
        net(x).square().mean().backward()
    for name, p in vanilla.named_parameters():
        assert torch.equal(p.grad, weights[name].grad), name


def test_random_times_leave_the_weights_of_the_seed():
    nets = []
    for tau_init in ("uniform", "random"):
        torch.manual_seed(3)
        nets.append(MeanFieldResNet(14, tau_init=tau_init, horizon=2.0))
    assert torch.equal(nets[0].stage3.particles[0].conv2.weight, nets[1].stage3.particles[0].conv2.weight)
    taus = [layer.tau for layer in nets[1].mean_field_layers().values()]
    assert all(t[-1] <= 2 for t in taus) and taus[1].tolist() != taus[2].tolist()


def test_initialisation_is_he_2015():
    torch.manual_seed(0)
    model = MeanFieldResNet(20)
    for m in model.modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 4000:
            fan_out = m.out_channels * m.kernel_size[0] ** 2
            assert m.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


def test_pieces_of_the_forward_pass_agree():
    model = MeanFieldResNet(14, drop_rate=0.5).eval()
    x = torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    assert features.shape == (2, 64, 8, 8) and torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, 64)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, features)
    assert [m.shape[1:] for m in maps] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert [(i["num_chs"], i["reduction"]) for i in model.feature_info] == [(16, 1), (32, 2), (64, 4)]
    last = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    assert len(last) == 1 and torch.equal(last[0], features)
    early = model.forward_intermediates(x, indices=[0, -2], intermediates_only=True, stop_early=True)
    assert all(torch.equal(a, b) for a, b in zip(early, maps[:2], strict=True))


def test_the_classifier_can_be_replaced():
    model = MeanFieldResNet(8)
    model.reset_classifier(3)
    assert model.get_classifier() is model.fc and model(torch.randn(1, 3, 8, 8)).shape == (1, 3)
    model.reset_classifier(0, "")
    assert model(torch.randn(1, 3, 8, 8)).shape == (1, 64, 2, 2) and model.num_classes == 0
    assert MeanFieldResNet(8, num_classes=0)(torch.randn(1, 3, 8, 8)).shape == (1, 64)
    for arguments, match in (((3, "median"), "global_pool"), ((-1,), "num_classes"), ((3, ""), "without pooling")):
        with pytest.raises(ValueError, match=match):
            model.reset_classifier(*arguments)


def test_checkpointing_changes_no_gradient():
    nets = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = MeanFieldResNet(14)
        model.set_grad_checkpointing(enable)
        model(torch.ones(2, 3, 8, 8)).sum().backward()
        nets.append(model)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_parameter_names_sort_into_groups():
    model = MeanFieldResNet(14)
    assert model.no_weight_decay() == {f"stage{s}.particles.tau_axis.offset" for s in (1, 2, 3)}
    assert model.group_matcher()["stem"] == r"^stem"


def test_a_checkpoint_for_another_depth_names_both_and_changes_nothing():
    model, other = MeanFieldResNet(20), MeanFieldResNet(32)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"checkpoint of depth 32 \(.*but this model has depth 20"):
        model.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"checkpoint of depth 8 \(.*but this model has depth 20"):
        model.load_state_dict(MeanFieldResNet(8).state_dict())
    with pytest.raises(ValueError, match="depth 29 .blocks of 3 layers.*depth 20 .blocks of 2"):
        model.load_state_dict(MeanFieldResNet(29, block="bottleneck").state_dict())
    damaged = copy.deepcopy(before)
    damaged["stem.weight"] += 1
    damaged["stage3.particles.tau_axis.anchor"][0] = float("inf")
    with pytest.raises(ValueError, match=r"stage3.particles.tau_axis.anchor'\] is not finite"):
        model.load_state_dict(damaged)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.load_state_dict(before).missing_keys == []


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"depth": 21}, r"depth must be 6k \+ 2 for block='basic' .*got 21; the nearest is 20"),
        ({"depth": 163, "block": "bottleneck"}, r"9k \+ 2.*got 163; the nearest is 164"),
        ({"depth": 2}, "depth must be"),
        ({"depth": "20"}, "depth must be .*got '20'"),
        ({"block": "wide"}, "block must be one of .*got 'wide'"),
        ({"num_classes": -1}, "num_classes must be an integer of at least 0, got -1"),
        ({"in_chans": 0}, "in_chans must be an integer of at least 1, got 0"),
        ({"tau_init": "sorted"}, "tau_init must be"),
        ({"horizon": -1}, "horizon must be positive"),
        ({"depth": 20, "blocks": (3, 3, 3)}, r"depth and blocks both .* 20 and \(3, 3, 3\)"),
        ({"blocks": (3, 3)}, r"blocks must hold .* 3 stages, at least 0, 1, 1 .*got \(3, 3\)"),
        ({"blocks": (3, 0, 3)}, r"at least 0, 1, 1 .*got \(3, 0, 3\)"),
        ({"blocks": (0, 1, 1), "block": "bottleneck"}, "at least 1, 1, 1 for block='bottleneck'"),
        ({"blocks": (3, True, 3)}, "blocks must hold"),
        ({"blocks": 9}, "blocks must hold .*got 9"),
    ],
)
def test_bad_input_is_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        MeanFieldResNet(**arguments)


def test_intermediates_refuse_what_they_cannot_do():
    model, x = MeanFieldResNet(8), torch.randn(1, 3, 8, 8)
    for arguments, match in (
        ({"output_fmt": "NLC"}, "output_fmt"),
        ({"stop_early": True}, "stop_early needs"),
        ({"indices": 4}, "1 to 3 stages, got 4"),
        ({"indices": [3]}, r"-3..2, got \[3\]"),
    ):
        with pytest.raises(ValueError, match=match):
            model.forward_intermediates(x, **arguments)


@pytest.mark.parametrize(
    "blocks, block, particles",
    [
        ((4, 3, 6), "basic", (4, 2, 5)),
        ((1, 1, 2), "basic", (1, 1)),
        ((0, 1, 1), "basic", ()),
        ((1, 2, 1), "bottleneck", (1,)),
        ((2, 1, 3), "resnext", (1, 2)),
    ],
)
def test_any_number_of_blocks_in_each_stage(blocks, block, particles):
    model = MeanFieldResNet(blocks=blocks, block=block, base_width=4)
    assert tuple(len(layer) for layer in model.mean_field_layers().values()) == particles
    assert model.blocks == blocks and model(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) - (2 if block == "basic" else 3) + 1 == model.depth  # without shortcuts, with the classifier


def test_equal_blocks_are_the_network_of_that_depth():
    nets = []
    for arguments in ({"depth": 14}, {"blocks": [2, 2, 2]}):
        torch.manual_seed(0)
        nets.append(MeanFieldResNet(**arguments).eval())
    assert nets[0].depth == nets[1].depth == 14 and nets[0].blocks == (2, 2, 2)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(nets[0](x), nets[1](x))


@pytest.mark.parametrize(
    "arguments",
    [
        {"blocks": (4, 1, 3), "num_classes": 7, "in_chans": 1},
        {"blocks": (0, 1, 1)},
        {"blocks": (2, 3, 1), "block": "bottleneck", "num_classes": 0},
        {"blocks": (1, 3, 2), "block": "resnext", "cardinality": 2, "base_width": 8},
        {"depth": 14, "learn_tau": False, "horizon": 1.0},
        {"depth": 14, "horizon": 1.0, "tau_init": "random"},
    ],
)
def test_a_checkpoint_makes_the_model_it_comes_from(arguments):
    torch.manual_seed(0)
    model = MeanFieldResNet(**arguments)
    for layer in model.mean_field_layers().values():  # so that neither times nor statistics are those of a new model
        layer.set_tau_(layer.tau * 0.7)
    model(torch.randn(4, model.in_chans, 8, 8))
    random_state = torch.get_rng_state()
    made = MeanFieldResNet.from_checkpoint(model.state_dict())
    assert torch.equal(torch.get_rng_state(), random_state)  # nothing was drawn
    assert (made.blocks, made.block, made.depth) == (model.blocks, model.block, model.depth)
    x = torch.randn(2, model.in_chans, 8, 8)
    assert torch.equal(made.eval()(x), model.eval()(x))
    state = made.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in made.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_model_from_a_checkpoint_has_its_dtype_and_trains():
    model = MeanFieldResNet(blocks=(2, 1, 2)).double()
    made = MeanFieldResNet.from_checkpoint(model.state_dict(), drop_rate=0.1, global_pool="max")
    assert made.stem.weight.dtype == torch.float64 and (made.drop_rate, made.global_pool) == (0.1, "max")
    assert made.stage1.particles.tau.dtype == torch.float64
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    made(torch.randn(2, 3, 8, 8, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(made.stem.weight, model.stem.weight)


def test_what_is_no_checkpoint_makes_no_model():
    good = MeanFieldResNet(blocks=(1, 1, 2)).state_dict()
    for state, error, match in (
        ([], TypeError, "mapping of names to tensors, got list"),
        ({1: torch.zeros(1)}, TypeError, "has the key 1"),
        ({"epoch": 3, "state_dict": good}, ValueError, "no checkpoint of a MeanFieldResNet.*begin with epoch"),
        ({f"module.{k}": v for k, v in good.items()}, ValueError, "without a prefix"),
        ({k: v for k, v in good.items() if k != "stem.weight"}, ValueError, "stem.weight'. must be a tensor of 4"),
        ({**good, "fc.weight": torch.zeros(3)}, ValueError, r"fc.weight'. must be .* shape \(3,\)"),
        ({k: v for k, v in good.items() if k != "norm.bias"}, RuntimeError, "norm.bias"),
        ({**good, "stage3.particles.tau_axis.offset": torch.tensor([float("nan")])}, ValueError, "not finite"),
    ):
        with pytest.raises(error, match=match):
            MeanFieldResNet.from_checkpoint(state)


def test_depths_are_compared_stage_by_stage():
    model = MeanFieldResNet(blocks=(2, 3, 2))
    with pytest.raises(
        ValueError, match=r"depth 16 \(blocks of 2 layers: 3, 2, 2\).*depth 16 .*2, 3, 2.*from_checkpoint"
    ):
        model.load_state_dict(MeanFieldResNet(blocks=(3, 2, 2)).state_dict())


@pytest.mark.parametrize(
    "removed, blocks",
    [
        (("stage1.particles.0", "stage2.particles.1"), (2, 2, 3)),
        ([f"stage1.particles.{i}" for i in range(3)], (0, 3, 3)),
    ],
)
def test_a_network_that_has_lost_blocks_is_made_anew_from_what_it_saved(removed, blocks):
    model, x = MeanFieldResNet(20), torch.randn(4, 3, 8, 8)
    for layer in model.mean_field_layers().values():
        layer.set_tau_(layer.tau * 0.7)
    prune_depth_(model, remove=removed)
    saved = model.state_dict()
    with pytest.raises(ValueError, match="from_checkpoint"):
        MeanFieldResNet(20).load_state_dict(saved)
    made = MeanFieldResNet.from_checkpoint(saved)
    assert made.blocks == model.blocks == blocks and made.depth == model.depth == 2 * sum(blocks) + 2
    assert torch.equal(made.eval()(x), model.eval()(x))
    assert model.load_state_dict(saved).missing_keys == []
