"""FSDP2 on the recipes' command line: ``--trainer.strategy fsdp2``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from torch_meanfield import MeanFieldSequential


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's :class:`ModelParallelStrategy` with all devices in one data-parallel group, and checkpoints in one file.

    Parameters, gradients and optimizer state are divided among the devices. A checkpoint is that of a run on one device
    but for the form of its optimizer state, so `test` reads it anywhere.
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

    Blocks of mean-field layers are sharded each on its own, everything else, tau with it, at once with ``net``.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(net, FSDPModule):
        return
    for layer in [m for m in net.modules() if isinstance(m, MeanFieldSequential)]:
        for block in layer:
            fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
