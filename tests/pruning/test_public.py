"""The public CIFAR ResNets with their weights, on real images; skipped where the files are absent."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from torch_meanfield import convert, depth_scores, fold, prune_depth_

pytest.importorskip("PIL")

from recipes.backbones.cifar_resnet import FILES, CifarResNet, public_resnet
from tests.pruning.public_images import DATA, images

pytestmark = pytest.mark.skipif(
    not (DATA / FILES[20]).exists() or not (DATA / "cifar10_jpeg.npz").exists(), reason="no public weights or images"
)


def loss(model, x, y) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(x), y))


def test_greedy_scores_cut_a_real_network_better_than_cosines():
    x, y = images(0, 256)
    held_out = images(0, 256, "test")
    model = convert(public_resnet(20, DATA).eval(), x[:2])
    whole = loss(model, *held_out)
    losses = {}
    for by in ("greedy", "cosine"):
        scores = depth_scores(model, [(x, y)], by=by, progress=False)
        assert len(scores) == 7  # the first blocks of the second and the third stage change the shape
        cut = copy.deepcopy(model)
        report = prune_depth_(cut, remove=2, scores=scores, batches=[(x, y)])
        assert report.difference == 0.0 and report.norms == 15
        losses[by] = loss(cut, *held_out)
        stages = [3 - sum(name.startswith(f"layer{s}") for name in report.removed) for s in (1, 2, 3)]
        plain = CifarResNet(tuple(stages))
        plain.load_state_dict(fold(cut).state_dict(), strict=True)
        assert torch.equal(plain.eval()(x[:8]), cut(x[:8]))
    assert whole < losses["greedy"] < losses["cosine"]


def test_norms_that_are_not_re_estimated_are_those_of_another_network():
    x, y = images(0, 256)
    held_out = images(0, 256, "test")
    model = convert(public_resnet(20, DATA).eval(), x[:2])
    without = copy.deepcopy(model)
    gone = {"layer1.1", "layer2.1", "layer3.1"}
    prune_depth_(model, remove=gone, batches=[(x, y)])
    prune_depth_(without, remove=gone)
    assert loss(model, *held_out) < loss(without, *held_out)
