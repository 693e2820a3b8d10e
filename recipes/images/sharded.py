"""FSDP2 on the recipes' command line: ``--trainer.strategy fsdp2``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torch_meanfield import MeanFieldSequential, Neurons, Slice, find_populations
from torch_meanfield.particles.population import named_tensors


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's :class:`ModelParallelStrategy` with all devices in one data-parallel group.

    Parameters, gradients and optimizer state are divided among the devices; a checkpoint is one file with all of them,
    and `test` reads it on any number of devices. Batch norm's running statistics are those of the first device's
    images, as under DDP: see :func:`shard_`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)

    def setup_environment(self) -> None:
        """Size the group when the processes are known, and before they meet."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2: fully_shard over all devices")


def shard_(net: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the parameters of ``net`` over ``mesh``, gathered block by block; a second call changes nothing.

    Blocks of mean-field layers are sharded each on its own, everything else, tau with it, at once with ``net``. FSDP2
    leaves buffers alone; here the first device's are sent to all before each pass, as DDP does.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(net, FSDPModule):
        return
    for layer in [m for m in net.modules() if isinstance(m, MeanFieldSequential)]:
        for block in layer:
            fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    net.register_forward_pre_hook(_send_buffers)


def _send_buffers(net: nn.Module, args: tuple[Any, ...]) -> None:
    """Give all devices the first one's buffers, those of one kind in one message."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for buffer in net.buffers():
        kinds.setdefault(buffer.dtype, []).append(buffer.detach())
    for buffers in kinds.values():
        message = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(message, src=0)
        for buffer, part in zip(buffers, message.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


class FoundPopulations:
    """The populations of a network, found while it is whole; sharding replaces every parameter by another object.

    Args:
        net: The network before :func:`shard_`.
        example: An input of it.
    """

    def __init__(self, net: nn.Module, example: Tensor) -> None:
        names = {id(tensor): name for name, tensor in named_tensors(net).items()}
        self._neurons = [
            (p.name, p.roles, [(names[id(c.tensor)], c.dim, c.outer, c.inner) for c in p.slices(p.columns)])
            for p in find_populations(net, example)
        ]

    def within(self, net: nn.Module) -> list[Neurons | MeanFieldSequential]:
        """The same populations in the sharded network, and its layers whose blocks have a learned time."""
        tensors = named_tensors(net)
        neurons = [
            Neurons([Slice(tensors[tensor], *place) for tensor, *place in columns], roles, owner=net, name=name)
            for name, roles, columns in self._neurons
        ]
        layers = [m for m in net.modules() if isinstance(m, MeanFieldSequential)]
        return [*neurons, *(m for m in layers if m.position() is not None and len(m) > 1)]
