"""tau keeps its precision and its horizon, whatever is done to the model around it."""

import copy

import pytest
import torch
from torch import nn

from torch_meanfield import MeanFieldResNet, MeanFieldSequential
from torch_meanfield.depth.tau_axis import TauAxis


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


def test_it_shows_whether_its_particles_move():
    assert "tau_axis): TauAxis(4, learn=True)" in repr(_layer())
    assert "TauAxis(1, learn=False)" in repr(MeanFieldSequential(nn.Linear(2, 2), learn_tau=False))


def test_positions_of_any_kind_are_placed_with_the_precision_of_the_axis():
    for values in ([1, 2, 3, 4], torch.tensor([1, 2, 3, 4]), torch.tensor([1.0, 2, 3, 4], requires_grad=True)):
        layer = _layer()
        layer.set_tau_(values)
        assert layer.tau_axis.anchor.dtype == torch.float32 and not layer.tau_axis.anchor.requires_grad
        assert layer.tau.tolist() == [1, 2, 3, 4]
    double = _layer().double()
    double.set_tau_([1 / 3, 2 / 3, 1.0, 4 / 3])
    assert double.tau.tolist() == [1 / 3, 2 / 3, 1.0, 4 / 3]


def test_positions_that_are_fixed_are_projected_too():
    layer = MeanFieldSequential(*(nn.Linear(3, 3) for _ in range(3)), learn_tau=False)
    state = layer.state_dict()
    state["tau_axis.anchor"] = torch.tensor([-2.0, 0.5, -0.25])
    layer.load_state_dict(state)
    assert layer.tau_axis.read().tolist() == [0.0, 0.0, 0.5]


def test_another_device_and_a_narrow_dtype_at_once():
    axis = _layer().to("meta", torch.bfloat16).tau_axis
    assert axis.anchor.is_meta and axis.offset.is_meta
    assert axis.anchor.dtype == axis.offset.dtype == torch.float32


def test_a_narrow_offset_is_read_as_exactly_as_it_is_known():
    """What FSDP2 with a narrow param_dtype hands to forward: the offset rounded, the exact one kept beside it."""
    axis = TauAxis(3, 3.0)
    assert isinstance(axis.offset, nn.Parameter) and axis.exact_offset is None
    exact = torch.tensor([0.1, 50.013, -0.2])
    narrow = nn.Parameter(exact.bfloat16())
    axis._parameters["offset"] = narrow
    assert torch.equal(axis.positions(), axis.anchor + narrow.float())
    axis.exact_offset = exact
    assert torch.equal(axis.positions(), axis.anchor + exact) and axis.positions().dtype == torch.float32
    axis.positions().sum().backward()
    assert torch.equal(narrow.grad, torch.ones(3, dtype=torch.bfloat16))
    with torch.no_grad():
        narrow[1] = 7.0  # written behind our back: it wins
    assert axis.positions().tolist() == [*(axis.anchor + exact)[:1].tolist(), 9.0, *(axis.anchor + exact)[2:].tolist()]


def test_the_version_changes_with_whatever_changes_the_positions():
    axis = TauAxis(3, 3.0)
    seen = [axis.version()]
    with torch.no_grad():
        axis.offset.add_(1)
    seen.append(axis.version())
    old = [axis.anchor, axis.offset]  # kept, so that no other tensor can take over their identity
    axis.anchor = axis.anchor.clone()
    seen.append(axis.version())
    axis.offset = nn.Parameter(axis.offset.detach().clone())
    with torch.no_grad():
        axis.offset.add_(1)  # as often written to as the one before
    seen.append(axis.version())
    assert len(set(seen)) == 4 and axis.version() == axis.version() and len(old) == 2
    fixed = TauAxis(3, 3.0, learn=False)
    before, kept = fixed.version(), fixed.anchor
    fixed.anchor = fixed.anchor.clone()
    assert fixed.version() != before and kept is not fixed.anchor


def test_a_layer_made_in_inference_mode_runs_there():
    with torch.inference_mode():
        layer = _layer().eval()
        assert layer(torch.ones(2, 3)).isfinite().all() and layer.tau.tolist() == [1, 2, 3, 4]


def test_an_anchor_that_is_not_finite_is_refused_too():
    layer = _layer()
    state = layer.state_dict()
    state["tau_axis.anchor"] = torch.tensor([1.0, 2.0, float("inf"), 4.0])
    with pytest.raises(ValueError, match=r"state_dict\['tau_axis.anchor'\] is not finite"):
        layer.load_state_dict(state)


def test_an_order_is_read_under_function_transforms():
    layer, x = copy.deepcopy(_layer()).eval(), torch.randn(2, 3)
    with torch.no_grad():
        layer.tau_axis.offset.copy_(torch.tensor([2.5, 0.0, 0.0, 0.0]))
    parameters = {k: p.detach() for k, p in layer.named_parameters()}
    found = torch.func.grad(lambda p: torch.func.functional_call(layer, p, x).sum())(parameters)
    layer(x).sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(found[name], p.grad, msg=name)
