"""DDP and FSDP2 over two CPU processes: the same motions on every rank, and float32 steps under bfloat16 sharding."""

import os
import queue
import socket
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from torch_meanfield import MeanFieldSequential, subscribe

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
N, STEPS = 4, 60
# Before 2.7 the FSDP2 of torch ran its collectives on accelerator streams only.
FSDP_ON_CPU = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 7)


def _model():
    torch.manual_seed(0)
    branches = (nn.Sequential(nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(N))
    return nn.Sequential(nn.Linear(6, 6), MeanFieldSequential(*branches, horizon=1.0))


def _optimizer(model):
    weights = [p for n, p in model.named_parameters() if "tau" not in n]
    taus = [p for n, p in model.named_parameters() if "tau" in n]
    return torch.optim.AdamW([{"params": weights}, {"params": taus, "lr": 0.1}], lr=0.01)


def _train(model, data, push, layer):
    optimizer = _optimizer(model)
    motions = []
    with subscribe(lambda m: motions.append(m.index.tolist())):
        for t in range(STEPS):
            optimizer.zero_grad()
            # the push enters through the loss, so that it is averaged over ranks as any gradient is
            (model(data[t]).square().mean() + 20 * (layer.tau * push[t]).sum()).backward()
            optimizer.step()
    return motions


def _inputs():
    g = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, 4, 6, generator=g), torch.randn(STEPS // 6, N, generator=g).repeat_interleave(6, 0)


def _ddp(rank, world):
    model = _model()
    data, push = _inputs()
    wrapped = nn.parallel.DistributedDataParallel(model)
    half = data.shape[1] // world
    motions = _train(wrapped, data[:, rank * half : (rank + 1) * half], push, model[1])
    return motions, {k: v.numpy() for k, v in model.state_dict().items()}


def _fsdp(narrow):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = _model()
    model[1].set_tau_([0.2, 0.5, 0.513, 1.013])
    data, push = _inputs()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if narrow else MixedPrecisionPolicy()
    for branch in model[1]:
        fully_shard(branch, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    layer, seen = model[1], []

    def forward(x, plain=layer.forward):  # inside the sharded pass, where the parameters are gathered (and cast)
        seen.append(layer.steps())
        return plain(x)

    layer.forward = forward
    optimizer, motions = _optimizer(model), []
    with subscribe(lambda m: motions.append(m.index.tolist())):
        for t in range(STEPS):
            optimizer.zero_grad()
            model(data[t]).float().square().mean().backward()
            layer.tau_axis.offset.grad += _like(layer.tau_axis.offset, 20 * push[t])
            optimizer.step()
            exact = layer.tau_axis.read()
            with torch.no_grad():
                model(data[t])
            assert seen[-1].dtype == torch.float32
            assert (seen[-1].cumsum(0) - exact).abs().max() < 1e-6, (seen[-1], exact)
            assert exact.diff().min() >= 0
    state = {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).numpy() for k, v in model.state_dict().items()}
    moment = optimizer.state[layer.tau_axis.offset]["exp_avg"].full_tensor()
    return motions, {**state, "moment": moment.numpy()}


def _like(parameter, value):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.dtype), parameter.device_mesh, parameter.placements)


def _entry(rank, world, port, results):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        out = {"ddp": _ddp(rank, world)}
        if FSDP_ON_CPU:
            out |= {"fsdp": _fsdp(False), "fsdp bfloat16": _fsdp(True)}
        results.put((rank, out))
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks():
    """What each of two ranks ended with, by strategy: the motions it made and its state."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    results = mp.get_context("spawn").Queue()
    running = mp.spawn(_entry, (2, port, results), nprocs=2, join=False)
    out = []
    while len(out) < 2:
        try:
            out.append(results.get(timeout=1))
        except queue.Empty:
            running.join(timeout=0)  # raises what a rank raised
    running.join()
    return [result for _, result in sorted(out, key=lambda r: r[0])]


def test_data_parallel_ranks_move_as_one_process_would(ranks):
    model = _model()
    motions = _train(model, *_inputs(), model[1])
    assert ranks[0]["ddp"][0] == motions
    for name, value in model.state_dict().items():
        torch.testing.assert_close(torch.from_numpy(ranks[0]["ddp"][1][name]), value, rtol=1e-4, atol=1e-5, msg=name)


_fsdp_only = pytest.mark.skipif(not FSDP_ON_CPU, reason="FSDP2 runs on the CPU from torch 2.7 on")


@pytest.mark.parametrize(
    "strategy", ["ddp", pytest.param("fsdp", marks=_fsdp_only), pytest.param("fsdp bfloat16", marks=_fsdp_only)]
)
def test_ranks_move_alike(ranks, strategy):
    (motions, state), (their_motions, their_state) = ranks[0][strategy], ranks[1][strategy]
    assert motions == their_motions and len(motions) >= 5
    for name, value in state.items():
        assert (their_state[name] == value).all(), name
