"""The call that makes the plain network of the depth that is left: models of timm, and the ten lines of the page."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.convert.networks import CifarResNet, images
from tools.zoo import Timm
from tools.zoo_cut import cut
from torch_meanfield import conversion_report, convert, depth_scores, fold, prune_depth_

timm = pytest.importorskip("timm")

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "pruning.md").read_text()


@pytest.mark.parametrize(
    ("name", "size", "how"),
    [
        ("vit_tiny_patch16_224", 64, "create_model"),
        ("convnext_atto", 64, "create_model"),
        ("resnet14t", 64, ""),  # no two blocks of a kind
        ("poolformerv2_s12", 64, "class"),
        ("efficientnet_lite0", 64, "class"),
        ("regnetx_002", 64, "no constructor"),
    ],
)
def test_what_is_cut_and_folded_loads_into_a_network_of_fewer_blocks(name, size, how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's own
        assert cut(lambda **a: Timm().build(name, **a), [(3, size, size)]) == how


def test_arguments_that_a_model_was_made_with_are_in_the_call():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, in_chans=1, img_size=64, depth=4)
    model.pretrained_cfg = timm.models.get_pretrained_cfg("vit_tiny_patch16_224").to_dict()
    model.eval()
    convert(model, torch.randn(1, 1, 64, 64))
    report = prune_depth_(model, remove={"blocks.1"})
    assert str(report.constructor) == (
        "timm.create_model('vit_tiny_patch16_224', depth=3, num_classes=7, in_chans=1, img_size=64)"
    )
    assert f"loads into {report.constructor}" in str(report)
    twin, x = report.constructor().eval(), torch.randn(2, 1, 64, 64)
    twin.load_state_dict(fold(model).state_dict(), strict=True)
    assert torch.equal(twin(x), fold(model)(x))


def test_a_network_that_the_call_would_not_make_has_none():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", act_layer=nn.Tanh, img_size=64)
    convert(model, torch.randn(1, 3, 64, 64))
    assert prune_depth_(model, remove={"blocks.1"}).constructor is None
    assert prune_depth_(convert(CifarResNet(blocks=3), images()), remove={"groups.0.1"}).constructor is None


def test_classes_of_timm_are_as_they_were():
    cls = timm.models.vision_transformer.VisionTransformer
    init = cls.__init__
    model = convert(timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=3), torch.randn(1, 3, 64, 64))
    prune_depth_(model, remove={"blocks.11"})
    assert cls.__init__ is init


def test_the_ten_lines_of_the_page_run(monkeypatch):
    block = re.search(r"```python\n(import timm.*?)```", PAGE, flags=re.S)[1]
    assert block.count("\n") <= 13
    torch.manual_seed(0)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    block = block.replace("resnet50", "resnet34")
    batches = [(torch.randn(4, 3, 32, 32), torch.randint(1000, (4,)))]

    def fine_tune(model, optimizer):
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(x), y).backward()
            optimizer.step()
        model.eval()

    scope = {"batches": batches, "fine_tune": fine_tune}
    exec(compile(block.replace("pretrained=True)", "pretrained=True).eval()"), "docs/pruning.md", "exec"), scope)
    x = torch.randn(2, 3, 64, 64)
    assert len(scope["report"].removed) == 4 and len(scope["scores"]) == 13
    assert torch.equal(scope["twin"].eval()(x), scope["plain"].eval()(x))
    assert conversion_report(scope["plain"]).fold_error < 1e-5
    assert depth_scores(scope["model"], by="step").order
