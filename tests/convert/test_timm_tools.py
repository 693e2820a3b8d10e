"""What people do with timm models goes on after a conversion: features, checkpointing, averages, hooks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_meanfield import conversion_report, convert, resort_

timm = pytest.importorskip("timm")


def push(model: Any, to: float = 1.5) -> None:
    """Move the first particle of the first stage behind the second, unsorted."""
    stage = conversion_report(model).stages[0].module
    with torch.no_grad():
        stage.tau_axis.offset[0] += to


@pytest.mark.parametrize("name", ["test_convnext", "resnet18", "test_vit"])
def test_features_only(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True).eval()
    with torch.no_grad():
        for p in model.parameters():  # some begin with branches that are 0
            p.add_(0.05 * torch.randn_like(p))
    x = torch.randn(2, 3, *timm.get_pretrained_cfg(name).input_size[1:])
    before = model(x)
    convert(model, x)
    assert all(torch.equal(a, b) for a, b in zip(before, model(x), strict=True))
    push(model, 0.5)
    assert not torch.equal(before[-1], model(x)[-1])


def test_gradient_checkpointing() -> None:
    torch.manual_seed(0)
    model = convert(timm.create_model("test_vit", num_classes=3), torch.randn(1, 3, 160, 160)).train()
    push(model, 0.3)
    x = torch.randn(2, 3, 160, 160)
    gradients: list[list[Tensor]] = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_timms_average_follows_a_re_sort() -> None:
    from timm.utils import ModelEmaV3

    torch.manual_seed(0)
    model = convert(timm.create_model("test_vit", num_classes=3), torch.randn(1, 3, 160, 160))
    average = ModelEmaV3(model, decay=0.5)
    mine, theirs = (conversion_report(m).stages[0].module for m in (model, average.module))
    with torch.no_grad():
        for p in average.module.parameters():
            p.add_(0.25)
    before = [next(blocks[0].parameters()).clone() for blocks in theirs]
    push(model)
    (motion,) = resort_(model)
    index = motion.index.tolist()
    assert index[:2] == [1, 0] and len(mine) == len(theirs)
    assert all(torch.equal(next(theirs[i][0].parameters()), before[j]) for i, j in enumerate(index))


def test_hooks_of_the_user_still_fire() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3).eval()
    plain = copy.deepcopy(model)
    seen: dict[str, list[Tensor]] = {"plain": [], "converted": []}
    for which, m in (("plain", plain), ("converted", model)):
        for block in m.blocks:
            block.mlp.fc2.register_forward_hook(lambda module, args, out, w=which: seen[w].append(out))
    x = torch.randn(1, 3, 160, 160)
    convert(model, x)
    assert not seen["converted"]  # not by the search
    with torch.no_grad():
        plain(x), model(x)
    assert len(seen["plain"]) == len(plain.blocks)
    assert all(torch.equal(a, b) for a, b in zip(seen["plain"], seen["converted"], strict=True))
