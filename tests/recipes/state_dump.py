"""A callback for test_parallel.py, named on the command line: what this rank ended with, whole, in a file."""

from pathlib import Path

import torch
from lightning.pytorch import Callback

from torch_meanfield import subscribe


def _whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


class StateDump(Callback):
    """Write ``FOLDER/RANK.pt``: state of the model and of the optimizer by name, motions, births, images seen.

    Args:
        folder: where to write.
    """

    def __init__(self, folder: str):
        self.folder, self.motions, self.seen = folder, [], []

    def on_fit_start(self, trainer, pl_module):
        self.handle = subscribe(lambda motion: self.motions.append((motion.cause, motion.index.tolist())), pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch[0].double().sum())

    def on_fit_end(self, trainer, pl_module):
        self.handle.remove()
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        state = trainer.optimizers[0].state
        out = {
            "parameters": {name: _whole(p) for name, p in pl_module.named_parameters()},
            "buffers": {name: _whole(b) for name, b in pl_module.named_buffers()},
            "optimizer": {
                f"{names[p]}/{k}": _whole(v) for p, s in state.items() for k, v in s.items() if v is not None
            },
            "sharded": [name for name, p in pl_module.named_parameters() if hasattr(p, "full_tensor")],
            "motions": self.motions,
            "born": pl_module.born,
            "seen": torch.stack(self.seen),
            "strategy": type(trainer.strategy).__name__,
        }
        torch.save(out, Path(self.folder) / f"{trainer.global_rank}.pt")
