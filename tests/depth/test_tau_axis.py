"""tau keeps its precision and its horizon, whatever is done to the model around it."""

import copy

import pytest
import torch
from torch import nn

from torch_meanfield import MeanFieldResNet, MeanFieldSequential


def _layer(n=4):
    torch.manual_seed(0)
    return MeanFieldSequential(*(nn.Linear(3, 3) for _ in range(n)))


@pytest.mark.parametrize(
    "narrow",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.double().bfloat16(),
        lambda m: m.type(torch.float16),
    ],
)
def test_positions_and_steps_stay_float32(narrow):
    layer = _layer()
    layer.set_tau_([49.1, 50.2, 50.2001, 61.3])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer.tau.detach().clone()
    narrow(layer)
    assert layer[0].weight.dtype in (torch.float16, torch.bfloat16)
    assert layer.tau.dtype == layer.steps().dtype == layer.tau_axis.offset.dtype == torch.float32
    assert torch.equal(layer.tau, before)
    assert optimizer.param_groups[0]["params"][-1] is layer.tau_axis.offset
    layer(torch.ones(2, 3, dtype=layer[0].weight.dtype)).float().sum().backward()
    layer.tau_axis.offset.grad = torch.full((4,), 1.0)
    optimizer.step()
    torch.testing.assert_close(layer.tau, before - 0.1, rtol=0, atol=1e-5)  # a bfloat16 tau could not have moved


def test_a_double_model_has_double_positions():
    layer = _layer().double()
    assert layer.tau.dtype == layer.steps().dtype == torch.float64
    built = MeanFieldSequential(nn.Linear(3, 3).double(), nn.Linear(3, 3).double(), horizon=1 / 3)
    assert built.tau.dtype == torch.float64 and built.tau[-1].item() == pytest.approx(1 / 3, rel=1e-15)
    assert layer.float().tau.dtype == torch.float32


def test_autocast_leaves_the_steps_alone():
    layer = _layer()
    layer.set_tau_([1.013, 2.026, 3.039, 4.052])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.steps().dtype == torch.float32
        torch.testing.assert_close(layer.steps(), torch.full((4,), 1.013), rtol=0, atol=1e-6)
        assert layer(torch.randn(2, 3)).isfinite().all()


@pytest.mark.parametrize("opaque", [False, True])
def test_a_narrow_model_computes_with_the_exact_step(opaque):
    """In bfloat16, 1.013 would be 1.0156: the branch must be scaled in float32 and rounded once."""
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Linear(64, 64), nn.Hardtanh(-9, 9)) if opaque else nn.Linear(64, 64)
    layer = MeanFieldSequential(branch)
    layer.set_tau_([1.013])
    x = torch.randn(256, 64).bfloat16()
    layer.bfloat16()
    with torch.no_grad():
        update = (layer(x) - x).float()
        exact = branch(x).float() * 1.013
    slope = (update * exact).sum() / exact.square().sum()
    assert abs(slope - 1) < 1e-3  # 1.0156 / 1.013 = 1.0026


def test_moving_to_meta_and_back_keeps_what_it_can():
    layer = _layer().to("meta")
    assert layer(torch.empty(2, 3, device="meta")).shape == (2, 3)
    layer.to_empty(device="cpu")
    layer.load_state_dict(_layer().state_dict())
    assert layer.tau.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4),
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-2),
    ],
)
def test_weight_decay_does_not_shrink_the_horizon(make):
    """The one-line optimizer of existing code, with lr x decay summing to that of the published schedule."""
    placed, learned = _layer(9), _layer(9)
    placed.set_tau_([1, 2, 3, 4, 5, 6, 7, 8, 12])
    with torch.no_grad():
        learned.tau_axis.offset.copy_(torch.tensor([0, 0.2, -0.3, 0.1, 0, 0, 0.4, 0, 3.0]))
    plain = nn.Parameter(torch.arange(1.0, 10))  # the trap: positions themselves as a parameter
    before, offsets = placed.tau.detach().clone(), learned.tau_axis.offset.detach().clone()
    parameters = [*placed.parameters(), *learned.parameters(), plain]
    optimizer = make(parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for _ in range(3_300):
        optimizer.step()
    assert plain[-1] < 0.75 * 9  # 28 % of the horizon lost
    assert torch.equal(placed.tau, before)  # what was placed stays, bit for bit
    torch.testing.assert_close(learned.tau_axis.offset.detach(), offsets * (plain[-1] / 9).item(), rtol=1e-3, atol=0)
    assert learned.tau[-1] > 9  # what was learned decays towards equal steps, not towards a horizon of 0


def test_vanilla_and_mean_field_networks_keep_their_dtype_contract():
    model = MeanFieldResNet(depth=8).half()
    assert model.stage1.particles.tau.dtype == torch.float32
    assert copy.deepcopy(model).stage1.particles.tau.dtype == torch.float32
