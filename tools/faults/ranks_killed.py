"""A Lightning training on two ranks, all of whose processes are killed with SIGKILL, and resumed."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import socket
import traceback
import warnings
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from recipes.images.saving import WholeFiles
from recipes.images.sharded import FSDP2Strategy
from tools.faults.digits import BATCH, Net, differences, digits
from tools.faults.kills import KEPT, Death, Outcome, clone, newest, write
from tools.faults.ranks import PRELOAD, Objective, optimizer_for, shard_, whole_state
from torch_meanfield.lightning import ExactResume, MeanFieldMonitor

RANKS = 2
STRATEGIES = ("DDP", "FSDP2")


class Normed(Objective):
    """Behind a batch norm, whose running statistics are those of each rank's own images."""

    def __init__(self) -> None:
        super().__init__(Net())
        self.norm = nn.BatchNorm1d(64)

    def forward(self, images: Tensor, labels: Tensor, push: Tensor) -> Tensor:
        """See :class:`Objective`."""
        return super().forward(self.norm(images), labels, push)


class Task(LightningModule):
    """Dropout that each rank draws for itself, births, a schedule, and a validation."""

    def __init__(self, death: Death) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.objective, self.death = Normed(), death
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard_(self.objective, self.objective.net, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.death.comes(self.global_step, "forward")
        draw = torch.Generator().manual_seed(self.global_step)  # tau is pushed about on all ranks alike
        loss: Tensor = self.objective(*batch, torch.randn(len(self.objective.net.stack), generator=draw))
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]), sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.objective(*batch, torch.zeros(len(self.objective.net.stack)))
        self.log("val_loss", loss, batch_size=len(batch[0]), sync_dist=True)

    def on_train_epoch_end(self) -> None:
        self.losses += [self.trainer.callback_metrics[name].item() for name in ("loss", "val_loss")]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["losses"] = list(self.losses)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.losses = checkpoint["losses"]

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_for(self.objective.net)
        optimizer.add_param_group({"params": list(self.objective.norm.parameters())})
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        optimizer.register_step_post_hook(lambda *_: self.death.comes(self.global_step, "stepped"))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*digits()), BATCH // RANKS, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*(t[:64] for t in digits())), 32)


class OwnChance(Callback):
    """Give each rank generators of its own, where the training begins and again wherever it is resumed."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.manual_seed(100 + trainer.global_rank)
        random.seed(trainer.global_rank)


class End(Callback):
    """Take down the state of this rank, before anything is put in order after the training."""

    def __init__(self, monitor: MeanFieldMonitor) -> None:
        self.monitor, self.state = monitor, dict[str, Any]()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Task)
        optimizer: Any = trainer.optimizers[0]
        state = {
            **whole_state(pl_module, optimizer),
            "birth_death": optimizer.state_dict()["birth_death"],
            "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "generator": torch.get_rng_state(),
            "python": list(random.getstate()[1]),
            "losses": pl_module.losses,
            "trajectories": self.monitor.state_dict(),
        }
        self.state = clone(state)


def _rank(strategy: str, rank: int, port: int, folder: Path, epochs: int, death: Death) -> None:
    try:
        _fit(strategy, rank, port, folder, epochs, death)
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()[-4000:]}")
        os._exit(1)


def _fit(strategy: str, rank: int, port: int, folder: Path, epochs: int, death: Death) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for library in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{library}").setLevel(logging.ERROR)
    # as a launcher of processes would have it; Lightning joins them
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    class Files(WholeFiles):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            write(checkpoint, Path(path), checkpoint["global_step"] - 1, death)

    monitor = MeanFieldMonitor(1, plot=False, keep=True)
    end = End(monitor)
    saving = ModelCheckpoint(folder, filename="{step:05}", every_n_train_steps=KEPT, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy="ddp" if strategy == "DDP" else FSDP2Strategy(),
        max_epochs=epochs,
        callbacks=[OwnChance(), monitor, end, saving, ExactResume()],
        plugins=[Files()],
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    death.start()
    trainer.fit(Task(death), ckpt_path=newest(folder))
    torch.save(end.state, folder / f"{rank}.pt.partial")
    os.replace(folder / f"{rank}.pt.partial", folder / f"{rank}.pt")


def run(strategy: str, folder: Path, epochs: int, death: Death) -> bool:
    """Train on all ranks from where ``folder`` is; whether they came to their end. When one dies, all are killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *PRELOAD])  # imported once for all
    ranks = [context.Process(target=_rank, args=(strategy, r, port, folder, epochs, death)) for r in range(RANKS)]
    for process in ranks:
        process.start()
    wait([process.sentinel for process in ranks])
    died = [process.exitcode for process in ranks if process.exitcode]
    for process in ranks if died else ():
        process.kill()
    for process in ranks:
        process.join()
    died = died or [process.exitcode for process in ranks if process.exitcode]
    # what a rank that outlived the other by a moment has to say of it is no matter
    if died and -signal.SIGKILL not in died:
        errors = "\n".join(path.read_text() for path in folder.glob("*.error"))
        raise RuntimeError(f"{strategy}: ranks ended with {died} after {death}\n{errors}")
    return not died


def killed_and_resumed(strategy: str, folder: Path, epochs: int, deaths: list[Death], whole: Path) -> Outcome:
    """Train in pieces, in each of which all ranks die, and compare the ends of all ranks with those of ``whole``."""
    kills = 0
    for death in [*deaths, Death()]:
        if run(strategy, folder, epochs, death):
            break
        kills += 1
    return Outcome(kills, [d for rank in range(RANKS) for d in differences(ending(folder, rank), ending(whole, rank))])


def ending(folder: Path, rank: int) -> dict[str, Any]:
    """The state of ``rank`` at the end of the training in ``folder``."""
    state: dict[str, Any] = torch.load(folder / f"{rank}.pt", weights_only=True)
    return state
