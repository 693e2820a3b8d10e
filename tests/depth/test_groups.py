import pytest
import torch
from torch import nn

from torch_meanfield import MeanFieldResNet, param_groups


def test_tau_has_its_own_rate_and_no_decay():
    model = MeanFieldResNet(8)
    groups = param_groups(model, lr=0.1, weight_decay=1e-4, tau_lr_scale=10)
    weights, tau = groups
    assert (weights["lr"], weights["weight_decay"]) == (0.1, 1e-4)
    assert (tau["lr"], tau["weight_decay"]) == (1.0, 0.0)
    assert {id(p) for p in tau["params"]} == {id(model.stage1.particles.tau_axis.offset)}
    every = [id(p) for g in groups for p in g["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters())
    optimizer = torch.optim.AdamW(groups)
    assert optimizer.param_groups[1]["lr"] == 1.0


def test_a_vanilla_twin_has_one_group():
    assert len(param_groups(MeanFieldResNet(8, learn_tau=False), lr=0.1)) == 1


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"lr": -1}, "lr must be a finite number >= 0, got -1"),
        ({"lr": 0.1, "weight_decay": float("nan")}, "weight_decay must be"),
        ({"lr": 0.1, "tau_lr_scale": "10"}, "tau_lr_scale must be .*'10'"),
    ],
)
def test_bad_rates_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        param_groups(MeanFieldResNet(8), **arguments)


def test_a_model_without_layers_is_named():
    with pytest.raises(ValueError, match="Linear holds no MeanFieldSequential"):
        param_groups(nn.Linear(2, 2), lr=0.1)
