"""The natural gradient: against a dense solve, least squares in one step, the linear rate; bad input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recipes.theory.natural_gradient import network, problem
from torch_meanfield.theory import NaturalGradient


def closure_of(net, loss):
    def closure():
        out = net()
        return loss(out), out

    return closure


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(7, 3, generator=g, dtype=torch.float64)
        self.a = nn.Parameter(torch.randn(3, 5, generator=g, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(5, 4, generator=g, dtype=torch.float64))
        self.idle = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self):
        return torch.tanh(self.x @ self.a) @ self.b


LOSSES = {
    "squared": lambda out: (out - 1).square().sum() / 14,
    "cross entropy": lambda out: F.cross_entropy(out, torch.arange(7) % 4),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("blocks", [1, 2])
def test_against_a_dense_solve(name, blocks):
    net, loss = Small(), LOSSES[name]
    flat = torch.cat([net.a.detach().flatten(), net.b.detach().flatten()])

    def outputs(theta):
        return torch.tanh(net.x @ theta[:15].view(3, 5)) @ theta[15:].view(5, 4)

    jacobian = torch.autograd.functional.jacobian(outputs, flat).view(28, 35)
    hessian = torch.autograd.functional.hessian(lambda o: loss(o.view(7, 4)), outputs(flat).flatten())
    gradient = torch.autograd.functional.jacobian(lambda t: loss(outputs(t)), flat)
    fisher = jacobian.T @ hessian @ jacobian + 1e-2 * torch.eye(35, dtype=torch.float64)
    if blocks == 2:
        fisher[:15, 15:] = fisher[15:, :15] = 0
    expected = flat - 0.3 * torch.linalg.solve(fisher, gradient)
    groups = (
        [{"params": [net.a, net.b, net.idle]}] if blocks == 1 else [{"params": [net.a]}, {"params": [net.b, net.idle]}]
    )
    optimizer = NaturalGradient(groups, lr=0.3, damping=1e-2, tolerance=1e-12)
    before = optimizer.step(closure_of(net, loss))
    assert before.item() == pytest.approx(loss(outputs(flat)).item())
    torch.testing.assert_close(torch.cat([net.a.flatten(), net.b.flatten()]).detach(), expected, rtol=1e-7, atol=1e-9)
    assert torch.equal(net.idle, torch.ones(2, dtype=torch.float64)) and len(optimizer.solves) == blocks


def test_the_residual_shrinks_by_one_minus_the_step_whatever_the_data():
    x, y = problem(6)
    net, eta = network(400, 0, 400**0.5), 0.3
    optimizer = NaturalGradient(net.parameters(), lr=eta, damping=1e-12, iterations=50, tolerance=1e-10)

    def closure():
        out = net(x)
        return (out - y).square().sum() / 12, out

    losses = torch.tensor([optimizer.step(closure).item() for _ in range(20)])
    ratios = losses[1:] / losses[:-1]
    assert ((ratios - (1 - eta) ** 2).abs() < 0.2 * (1 - eta) ** 2).all()
    torch.testing.assert_close(ratios[-5:], torch.full((5,), (1 - eta) ** 2), rtol=1e-3, atol=0)


def test_of_an_error_nothing_changes():
    net = Small()
    before = net.a.detach().clone()
    optimizer = NaturalGradient(net.parameters())
    for closure, message in (
        (None, "needs a closure"),
        (lambda: net().sum(), "a pair"),
        (lambda: (net(), net()), "finite scalar"),
        (lambda: (net().sum() * float("nan"), net()), "finite scalar"),
        (closure_of(net, lambda out: out.sum()), "not only linearly"),
        (lambda: (net().square().sum(), net()), "must depend on the output that the closure returned"),
        (lambda: (torch.ones(()), net()), "depend on the parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.step(closure)
        assert torch.equal(net.a, before)


@pytest.mark.parametrize("change", [{"lr": -1.0}, {"damping": float("nan")}, {"iterations": 0}, {"tolerance": -1.0}])
def test_bad_numbers_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        NaturalGradient(Small().parameters(), **change)


def test_a_frozen_group_is_left():
    net = Small()
    before = net.a.requires_grad_(False).clone()
    optimizer = NaturalGradient([{"params": [net.a]}, {"params": [net.b]}], damping=0.0)
    losses = [optimizer.step(closure_of(net, LOSSES["squared"])).item() for _ in range(2)]
    h, ones = torch.tanh(net.x @ net.a), torch.ones(7, 4, dtype=torch.float64)
    best = LOSSES["squared"](h @ torch.linalg.lstsq(h, ones).solution)
    assert torch.equal(net.a, before) and len(optimizer.solves) == 1
    assert losses[1] == pytest.approx(best.item(), rel=1e-6) and losses[0] > losses[1]  # linear in b: one step


def test_its_state_can_be_saved_and_scheduled():
    net = Small()
    optimizer = NaturalGradient(net.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step(closure_of(net, LOSSES["squared"]))
    schedule.step()
    other = NaturalGradient(net.parameters())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.25
