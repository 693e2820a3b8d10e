"""Trainings that are killed with SIGKILL and resumed, in processes of their own, against one that was not."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import signal
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.faults.digits import BATCH, IMAGES, Net, average_of, differences, digits, optimizer_of
from torch_meanfield.lightning import newest_checkpoint

BATCHES = IMAGES // BATCH
KEPT = 3  # steps from one checkpoint to the next
PHASES = ("forward", "stepped", "writing", "torn")  # where in a step a process can be told to die


@dataclass(frozen=True)
class Death:
    """When a process kills itself.

    Args:
        step: Optimizer steps taken so far; -1: not at a step.
        phase: One of :data:`PHASES`: before the forward pass, between the optimizer's step and all that follows it,
            half through the write of a checkpoint, or half through one that is written to its place without care.
        after: Seconds after the start, whatever is being done then; 0: never.
    """

    step: int = -1
    phase: str = ""
    after: float = 0.0

    def comes(self, step: int, phase: str) -> None:
        """Die here, if it is time."""
        if (self.step, self.phase) == (step, phase):
            os.kill(os.getpid(), signal.SIGKILL)

    def start(self) -> None:
        """Die later, whatever is being done then."""
        if self.after:
            clock = threading.Timer(self.after, os.kill, (os.getpid(), signal.SIGKILL))
            clock.daemon = True
            clock.start()


def write(state: Any, path: Path, step: int, death: Death) -> None:
    """Write a checkpoint beside its place and move it there, or die on the way."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content, partial_path = buffer.getvalue(), path.with_name(path.name + ".partial")
    for phase, torn in (("writing", partial_path), ("torn", path)):
        if (death.step, death.phase) == (step, phase):
            torn.write_bytes(content[: len(content) // 2])
            death.comes(step, phase)
    partial_path.write_bytes(content)
    os.replace(partial_path, path)


def newest(folder: Path) -> Path | None:
    """The checkpoint to resume from; that a torn one was passed over is what these runs are about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is not whole")
        return newest_checkpoint(folder)


# -- a loop by hand ------------------------------------------------------------------------------------------------


def plain_loop(folder: Path, steps: int, death: Death) -> dict[str, Any]:
    """Train for ``steps`` in all, from the newest checkpoint in ``folder``; the state at the end."""
    torch.manual_seed(0)
    net = Net()
    optimizer, average = optimizer_of(net), average_of(net)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order, losses, step = torch.empty(0, dtype=torch.int64), list[float](), 0
    parts = {"model": net, "average": average, "optimizer": optimizer, "schedule": schedule}
    path = newest(folder)
    if path is not None:
        saved = torch.load(path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        order, losses, step = saved["order"], saved["losses"], saved["step"]
        torch.set_rng_state(saved["generator"])

    def state() -> dict[str, Any]:
        kept = {name: part.state_dict() for name, part in parts.items()}
        return kept | {"order": order, "losses": losses, "step": step, "generator": torch.get_rng_state()}

    images, labels = digits()
    while step < steps:
        if step % BATCHES == 0:
            order = torch.randperm(IMAGES)
        death.comes(step, "forward")
        index = order[step % BATCHES * BATCH :][:BATCH]
        optimizer.zero_grad()
        loss = net.loss(images[index], labels[index])
        loss.backward()
        optimizer.step()
        death.comes(step, "stepped")
        schedule.step()
        average.update_parameters(net)
        losses.append(loss.item())
        step += 1
        if step % KEPT == 0:
            write(state(), folder / f"{step:05}.ckpt", step - 1, death)
    return state()


# -- Lightning -----------------------------------------------------------------------------------------------------


def lightning(folder: Path, steps: int, death: Death) -> dict[str, Any]:
    """The same in a ``Trainer`` with ``ExactResume``; the state at the end."""
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
    from torch.optim.swa_utils import get_ema_avg_fn
    from torch.utils.data import DataLoader, TensorDataset

    from recipes.images.saving import WholeFiles
    from torch_meanfield.lightning import ExactResume, MeanFieldMonitor

    class Files(WholeFiles):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            write(checkpoint, Path(path), checkpoint["global_step"] - 1, death)

    class Task(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            death.comes(self.global_step, "forward")
            loss = self.net.loss(*batch)
            self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]))
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            optimizer = optimizer_of(self.net)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
            optimizer.register_step_post_hook(lambda *_: death.comes(self.global_step, "stepped"))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(*digits()), BATCH, shuffle=True)

        def val_dataloader(self) -> Any:
            return DataLoader(TensorDataset(*(t[:64] for t in digits())), 64)

    class Metrics(Callback):
        def __init__(self) -> None:
            self.epochs: list[list[float]] = []

        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.epochs.append([trainer.callback_metrics[name].item() for name in ("loss", "val_loss")])

        def state_dict(self) -> dict[str, Any]:
            return {"epochs": [list(epoch) for epoch in self.epochs]}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.epochs = [list(epoch) for epoch in state_dict["epochs"]]

    class End(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            # before the averages replace the weights
            ending.update(
                model=pl_module.state_dict(),
                average=average._average_model.state_dict(),
                optimizer=trainer.optimizers[0].state_dict(),
                schedule=trainer.lr_scheduler_configs[0].scheduler.state_dict(),
                generator=torch.get_rng_state(),
                python=list(random.getstate()[1]),
                metrics=metrics.epochs,
                trajectories=monitor.state_dict(),
            )
            ending.update({key: clone(value) for key, value in ending.items()})

    ending: dict[str, Any] = {}
    metrics, monitor = Metrics(), MeanFieldMonitor(1, plot=False, keep=True)
    average = WeightAveraging(avg_fn=get_ema_avg_fn(0.9))
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=KEPT, save_top_k=-1)
    torch.manual_seed(0)
    random.seed(0)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-(-steps // BATCHES),
        callbacks=[metrics, monitor, End(), average, saving, ExactResume()],
        plugins=[Files()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(Task(), ckpt_path=newest(folder))
    return ending


def clone(value: Any) -> Any:
    """A copy that later steps do not change."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: clone(each) for key, each in value.items()}
    return type(value)(map(clone, value)) if isinstance(value, (list, tuple)) else value


FORMS: dict[str, Callable[[Path, int, Death], dict[str, Any]]] = {"plain loop": plain_loop, "Lightning": lightning}


# -- dying and going on --------------------------------------------------------------------------------------------


def _piece(form: str, folder: Path, steps: int, death: Death) -> None:
    import logging

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    death.start()
    ending = FORMS[form](folder, steps, death)
    torch.save(ending, folder / "ending.pt.partial")
    os.replace(folder / "ending.pt.partial", folder / "ending.pt")


def run(form: str, folder: Path, steps: int, death: Death) -> bool:
    """Train in a process of its own from where ``folder`` is; whether it came to its end."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "lightning.pytorch", "sklearn.datasets"])  # imported once for all
    process = context.Process(target=_piece, args=(form, folder, steps, death))
    process.start()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{form}: the process ended with {process.exitcode} after {death}; its error is above")
    return process.exitcode == 0


@dataclass(frozen=True)
class Outcome:
    """What became of one training that was killed.

    Args:
        kills: Number of its processes that were killed.
        differences: From the one that was not: none, if it survived.
    """

    kills: int
    differences: list[str]


def killed_and_resumed(form: str, folder: Path, steps: int, deaths: list[Death], whole: Path) -> Outcome:
    """Train in pieces, each of which dies its death, and compare the end with that of ``whole``, bit for bit."""
    kills = 0
    for death in [*deaths, Death()]:
        if run(form, folder, steps, death):
            break
        kills += 1
    endings = [torch.load(at / "ending.pt", weights_only=True) for at in (folder, whole)]
    return Outcome(kills, differences(*endings))


def random_deaths(seed: int, steps: int, count: int) -> list[Death]:
    """Deaths at random steps, each later than the one before, in all phases by turns."""
    draw = random.Random(seed)
    at = sorted(draw.sample(range(KEPT, steps), count))
    phases = [PHASES[(seed + i) % len(PHASES)] for i in range(count)]
    # checkpoints are written after every KEPT-th step
    return [
        Death(s if phase in PHASES[:2] else s - s % KEPT + KEPT - 1, phase) for s, phase in zip(at, phases, strict=True)
    ]
