"""FSDP2 in bfloat16: steps keep float32. For the rest of data parallel training see ``tests/trust/test_ranks.py``."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tools.faults.ranks import FSDP_ON_CPU, together
from torch_meanfield import MeanFieldSequential, subscribe

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs gloo and fork servers"),
    pytest.mark.skipif(not FSDP_ON_CPU, reason="FSDP2 runs on the CPU from torch 2.7 on"),
]
N, STEPS = 4, 60


def _like(parameter, value):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.dtype), parameter.device_mesh, parameter.placements)


def _narrow():
    """Train, tau pushed about; the motions, and the steps taken in the forward pass against the times at each step."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    branches = (nn.Sequential(nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(N))
    layer = MeanFieldSequential(*branches, horizon=1.0)
    model = nn.Sequential(nn.Linear(6, 6), layer)
    layer.set_tau_([0.2, 0.5, 0.513, 1.013])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for branch in layer:
        fully_shard(branch, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    motions, steps, times = [], [], []

    def forward(x, plain=layer.forward):  # inside the sharded pass, where the parameters are gathered (and cast)
        steps.append(layer.steps().detach())
        return plain(x)

    layer.forward = forward
    taus = [layer.tau_axis.offset]
    weights = [p for p in model.parameters() if p is not taus[0]]
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": taus, "lr": 0.1}], lr=0.01)
    g = torch.Generator().manual_seed(1)
    data, push = torch.randn(STEPS, 4, 6, generator=g), torch.randn(STEPS // 6, N, generator=g).repeat_interleave(6, 0)
    with subscribe(lambda m: motions.append(m.index.tolist())):
        for t in range(STEPS):
            optimizer.zero_grad()
            model(data[t]).float().square().mean().backward()
            layer.tau_axis.offset.grad += _like(layer.tau_axis.offset, 20 * push[t])
            optimizer.step()
            times.append(layer.tau_axis.read())
            with torch.no_grad():
                model(data[t])
    return motions, steps[1::2], times


def test_steps_are_exact_in_a_pass_that_rounds_its_parameters():
    (motions, steps, times), theirs = together(2, _narrow)
    assert motions == theirs[0] and len(motions) >= 5
    assert len(steps) == len(times) == STEPS
    for step, tau in zip(steps, times, strict=True):
        assert step.dtype == torch.float32
        assert (step.cumsum(0) - tau).abs().max() < 1e-6, (step, tau)
        assert tau.diff().min() >= 0
