"""A default device and dtype that are not the model's change nothing, from finding populations to the last birth."""

import copy
from contextlib import nullcontext

import torch
from torch import nn

from tests.convert.networks import CifarResNet, images
from tests.defaults import other_defaults
from tools.faults.digits import differences
from torch_meanfield import BirthDeathOptimizer, MeanFieldSequential, convert, fold
from torch_meanfield.width.search.find import find_populations
from torch_meanfield.width.search.proof import verify


def _train(defaults):
    torch.manual_seed(0)
    model, x = CifarResNet(blocks=3), images(4)
    with defaults:
        found = find_populations(model, x).populations
        assert found and all(verdict.proven for verdict in verify(model, x, found))
        convert(model, x, horizon=1.0)
        optimizer = BirthDeathOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), model, example_input=x, every=2, threshold=0.3
        )
        events = []
        optimizer.register_event_hook(events.append)
        for _ in range(6):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert events
        folded = fold(model, x).state_dict()
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "folded": folded})


def test_a_training_is_the_same_under_other_defaults():
    assert differences(_train(nullcontext()), _train(other_defaults())) == []


def test_so_is_a_layer_whose_times_are_drawn():
    def drawn(defaults):
        torch.manual_seed(0)
        layer = MeanFieldSequential(*(nn.Linear(4, 4) for _ in range(3)))
        with defaults:
            first = layer.draw_tau_(torch.Generator().manual_seed(1)).tau.tolist()
            return first, layer.draw_tau_().tau.tolist()

    assert drawn(nullcontext()) == drawn(other_defaults())
