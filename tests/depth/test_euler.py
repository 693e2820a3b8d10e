"""One Euler step against ``x + step * branch(x)``."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from torch_meanfield.depth.euler import euler_step


class Subclass(nn.Linear):
    """A linear layer whose weight means something else."""

    def forward(self, x):
        return super().forward(x).tanh()


BRANCHES = {
    "linear": lambda: nn.Linear(6, 6),
    "linear without bias": lambda: nn.Linear(6, 6, bias=False),
    "mlp": lambda: nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)),
    "nested": lambda: nn.Sequential(nn.LayerNorm(6), nn.Sequential(nn.ReLU(), nn.Linear(6, 6))),
    "norm last": lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)),
    "subclass": lambda: Subclass(6, 6),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
    "empty": lambda: nn.Sequential(),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_agrees_with_the_plain_step_and_its_gradients(name):
    torch.manual_seed(0)
    branch = BRANCHES[name]().double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    step = torch.tensor(1.37, dtype=torch.float64, requires_grad=True)
    ours = euler_step(x, branch, step)
    plain = x + step * branch(x)
    torch.testing.assert_close(ours, plain)
    inputs = [x, step, *branch.parameters()]
    g = torch.randn_like(plain)
    for a, b in zip(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(plain, inputs, g), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("conv, dim", [(nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_convolutions_of_every_kind(conv, dim, mode):
    torch.manual_seed(0)
    branch = nn.Sequential(nn.ReLU(), conv(4, 4, 3, padding=1, groups=2, padding_mode=mode)).double()
    x = torch.randn(2, 4, *[5] * dim, dtype=torch.float64)
    step = torch.tensor(0.6, dtype=torch.float64)
    torch.testing.assert_close(euler_step(x, branch, step), x + step * branch(x))


@pytest.mark.parametrize("name", BRANCHES)
def test_a_unit_step_has_the_bits_of_the_plain_addition(name):
    torch.manual_seed(0)
    branch = BRANCHES[name]()
    for dtype in (torch.float32, torch.bfloat16):
        branch, x = branch.to(dtype), torch.randn(64, 6).to(dtype)
        assert torch.equal(euler_step(x, branch, torch.tensor(1.0)), x + branch(x))


def test_hooks_on_what_the_fold_bypasses_still_fire():
    branch = nn.Sequential(nn.ReLU(), nn.Linear(6, 6))
    x, step, seen = torch.randn(2, 6), torch.tensor(0.5), []
    for module in (branch, branch[1]):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *_: seen.append(1))
            torch.testing.assert_close(euler_step(x, branch, step), x + 0.5 * branch(x))
            handle.remove()
    assert len(seen) == 8
    handle = branch[1].register_full_backward_hook(lambda *_: seen.append(1))
    euler_step(x.requires_grad_(), branch, step).sum().backward()
    handle.remove()
    assert len(seen) == 9
