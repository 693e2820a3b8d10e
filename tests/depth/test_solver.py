"""A solver other than Euler's is one function."""

import copy
import pickle

import pytest
import torch
from torch import nn

from torch_meanfield import MeanFieldSequential
from torch_meanfield.depth.euler import SMALL, euler_step, euler_steps


def midpoint_step(x, branch, step):
    """The explicit midpoint rule, with the branch's weights as they are over the whole interval."""
    return x + step * branch(x + step / 2 * branch(x))


def _layer(**kwargs):
    torch.manual_seed(0)
    return MeanFieldSequential(*(nn.Sequential(nn.Tanh(), nn.Linear(3, 3)) for _ in range(4)), horizon=1.0, **kwargs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_layer_runs_its_solver_in_the_order_of_tau(checkpointing):
    layer = _layer(solver=midpoint_step)
    layer.grad_checkpointing = checkpointing
    layer.set_tau_([0.9, 0.2, 0.5, 1.4])
    x = torch.randn(2, 3)
    expected = x
    for branch, step in zip(layer, layer.steps(), strict=True):
        expected = midpoint_step(expected, branch, step)
    assert torch.equal(layer(x), expected) and not torch.allclose(expected, _layer()(x))
    layer(x).sum().backward()
    assert layer.tau_axis.offset.grad.abs().min() > 0


def test_the_midpoint_rule_is_of_second_order():
    """On x' = x, from 0 to 1, where Euler's rule is of first order."""

    def error(n, solver):
        layer = MeanFieldSequential(*(nn.Identity() for _ in range(n)), horizon=1.0, solver=solver)
        return abs(layer(torch.ones(())).item() - torch.e)

    assert 1.8 < error(8, euler_step) / error(16, euler_step) < 2.2
    assert 3.6 < error(8, midpoint_step) / error(16, midpoint_step) < 4.4


def test_copies_and_pickles_keep_the_solver_and_the_fixed_grid_uses_it():
    layer = _layer(solver=midpoint_step, learn_tau=False)
    x = torch.randn(2, 3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.solver is midpoint_step and torch.equal(twin(x), layer(x))
    assert _layer().state_dict().keys() == layer.state_dict().keys() | {"tau_axis.offset"}
    unit = MeanFieldSequential(nn.Linear(3, 3), learn_tau=False, solver=midpoint_step)
    assert torch.equal(unit(x), midpoint_step(x, unit[0], torch.tensor(1.0)))


def test_many_steps_at_once_have_the_bits_and_gradients_of_one_by_one():
    side = 1 + int(SMALL**0.5)  # its weights are too large to be scaled together
    torch.manual_seed(0)
    branches = [
        nn.Linear(side, side),
        nn.Sequential(nn.ReLU(), nn.Linear(side, 4), nn.Linear(4, side, bias=False)),
        nn.Sequential(nn.Linear(side, 4), nn.ReLU(), nn.Linear(4, side)),
        nn.Sequential(nn.Linear(side, side), nn.LayerNorm(side)),
    ]
    x, steps = torch.randn(2, side), torch.rand(4, requires_grad=True)
    inputs = [steps, *(p for branch in branches for p in branch.parameters())]
    together, apart = euler_steps(x, branches, steps.unbind()), x
    for branch, step in zip(branches, steps.unbind(), strict=True):
        apart = euler_step(apart, branch, step)
    assert torch.equal(together, apart)
    grads = [torch.autograd.grad(out.square().sum(), inputs, create_graph=True) for out in (together, apart)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    second = [torch.autograd.grad(sum(g.sin().sum() for g in gs), inputs) for gs in grads]
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_added_to_a_branch_later_is_honoured():
    layer, x, seen = _layer(), torch.randn(2, 3), []
    layer(x)
    handle = layer[1][1].register_forward_hook(lambda *_: seen.append(1))
    layer(x)
    handle.remove()
    assert seen == [1]
    layer[2][1].forward = lambda h: torch.zeros_like(h)
    expected = x
    for i, (branch, step) in enumerate(zip(layer, layer.steps(), strict=True)):
        expected = expected if i == 2 else euler_step(expected, branch, step)
    assert torch.equal(layer(x), expected)
