"""Learning rates, phases and data of the fine-tuning recipe, apart from its command line."""

import math

import pytest
import timm
import torch

from recipes.errors import BadInput
from recipes.finetune.data import FinetuneData
from recipes.finetune.model import Backbone, classifiers, layer_groups
from recipes.finetune.task import FinetuneTask, rate

VIT = {"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}


def vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=8, in_chans=1, num_classes=10, **VIT)


def test_layers_have_real_learning_rates_that_fall_towards_the_stem():
    model = vit()
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in layer_groups(model, 0.1, 0.05, 0.5) for p in g["params"]}
    assert len(rates) == len(list(model.parameters()))
    # The classifier, then three blocks, then the embedding; the last norm is a layer of its own in timm.
    of = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert of["head.weight"] == (0.1, 0.05)
    assert of["head.bias"] == (0.1, 0.0)
    top = of["blocks.2.mlp.fc1.weight"][0]
    assert top < 0.1
    assert of["blocks.1.mlp.fc1.weight"] == (pytest.approx(top / 2), 0.05)
    assert of["blocks.0.mlp.fc1.weight"] == (pytest.approx(top / 4), 0.05)
    assert of["patch_embed.proj.weight"] == (pytest.approx(top / 8), 0.05)
    assert of["pos_embed"] == (pytest.approx(top / 8), 0.0)
    assert not any("lr_scale" in g for g in layer_groups(model, 0.1, 0.05, 0.5))
    assert len(layer_groups(model, 0.1, 0.05, 1.0)) == 2


def test_conversion_changes_no_layers_rate_and_tau_has_a_group_without_decay():
    def groups(**more):
        torch.manual_seed(0)
        task = FinetuneTask(
            "vit_tiny_patch16_224", kwargs=VIT, lr=0.1, layer_decay=0.5, in_chans=1, side=8, tau_lr_scale=3.0, **more
        )
        names = {id(p): n for n, p in task.net.named_parameters()}
        found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in task._groups for p in g["params"]}
        assert len(found) == len(names)
        return found

    plain, converted = groups(mean_field=False), groups()
    taus = {name: converted.pop(name) for name in list(converted) if "tau" in name}
    assert converted == plain
    assert list(taus.values()) == [(pytest.approx(0.3), 0.0)]


def test_plain_and_mean_field_start_from_the_same_weights_and_random_state():
    nets, draws = [], []
    for mean_field in (False, True):
        torch.manual_seed(3)
        task = FinetuneTask("vit_tiny_patch16_224", kwargs=VIT, in_chans=1, side=8, mean_field=mean_field)
        nets.append(task.net.eval())
        draws.append(torch.rand(()))
    assert torch.equal(*draws)
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(nets[0](images), nets[1](images))


def test_the_rate_rises_and_falls_as_a_cosine_behind_the_classifiers_phase():
    factor = rate(total=120, head=20, head_factor=3.0, warmup=0.1)
    assert [factor(s) for s in (0, 19)] == [3.0, 3.0]
    assert [factor(s) for s in (20, 24, 29)] == [pytest.approx(x) for x in (0.1, 0.5, 1.0)]
    assert factor(30) == 1.0
    assert factor(75) == pytest.approx(0.5)
    assert factor(119) == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert factor(120) == pytest.approx(0)
    assert rate(total=4, head=0, head_factor=1.0, warmup=0.0)(0) == 1.0


@pytest.mark.parametrize(
    ("name", "head"),
    [("resnet10t", ["fc"]), ("convnext_atto", ["head.fc"]), ("deit_tiny_distilled_patch16_224", ["head", "head_dist"])],
)
def test_classifiers_are_known(name, head):
    assert list(classifiers(timm.create_model(name, num_classes=3))) == head


def test_a_transformer_is_built_for_the_images_and_a_convolution_takes_them():
    model = Backbone("vit_tiny_patch16_224", 3, 3, 32).create()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert Backbone("resnet10t", 3, 1, 40).create()(torch.randn(2, 1, 40, 40)).shape == (2, 3)
    with pytest.raises(BadInput, match="inception_v4.*8 pixels.*--size"):
        Backbone("inception_v4", 3, 3, 8).create()


def test_chosen_classes_are_numbered_anew_and_resized():
    data = FinetuneData(name="digits", classes=[7, 2], size=12, augment=False)
    assert (data.num_classes, data.side, data.label) == (2, 12, "digits-classes-7-2")
    data.open()
    every = FinetuneData(name="digits")
    every.open()
    mine, all_of_them = data._data["test"].images, every._data["test"].images
    assert len(mine) == int(((all_of_them.labels == 7) | (all_of_them.labels == 2)).sum())
    assert torch.equal(mine.pixels[mine.labels == 0], all_of_them.pixels[all_of_them.labels == 7])
    images, labels = data.on_after_batch_transfer((mine.pixels[:5], mine.labels[:5]), 0)
    assert images.shape == (5, 1, 12, 12)
