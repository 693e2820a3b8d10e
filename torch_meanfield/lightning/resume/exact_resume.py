"""A callback after which a resumed training is the training that was interrupted, to the bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from torch_meanfield._torch import (
    end_epoch_without_validation,
    fetcher_of,
    forget_resuming,
    load_loader_states,
    training_loader,
)
from torch_meanfield.lightning.resume import ends, generators, means, own_buffers
from torch_meanfield.lightning.resume.checks import VERSION, between_steps, part_of_rank
from torch_meanfield.lightning.resume.kept_models import name_all_plainly_, pair_averages
from torch_meanfield.lightning.resume.replay import Replay
from torch_meanfield.width import BirthDeathOptimizer


class ExactResume(Callback):
    """Save what Lightning leaves out of a checkpoint, so that a resumed run equals the uninterrupted one bit for bit.

    A Lightning checkpoint holds no generator, and no place in the epoch: a resumed run draws its dropout and its mixup
    anew, repeats the order of the first epoch, and from a checkpoint within an epoch shows some images twice and others
    never. With this callback the checkpoint holds, for each rank,

    - the states of Python's, NumPy's and torch's global generators, on the CPU and on all CUDA devices, and of
      every ``torch.Generator`` that the training loaders, their samplers and data sets have as an attribute;
    - how many batches of the epoch were used, and the generators as they were before its first. The epoch is begun
      again from there; its used batches are loaded once more and thrown away, since only that brings DataLoader
      workers back to where they were (for the same reason persistent workers are started anew in each epoch);
    - buffers in which the ranks differ: DDP and FSDP2 leave each its own statistics of batch norm;
    - of a ``BirthDeathOptimizer``, what each rank has seen since the last event, and under FSDP2 all that it adds to
      the wrapped optimizer's state;
    - the sums behind the means that ``self.log(..., on_epoch=True)`` keeps of the epoch (of tensors; torchmetrics
      objects are modules with a ``persistent`` state of their own).

    Loaders with ``state_dict`` and ``load_state_dict`` are resumed by themselves, as Lightning does it. The scaler of
    mixed precision, optimizers, schedulers and loops are in Lightning's checkpoint already.

    Validation within `fit` is given generators of its own: how often it happens does not change the training, and a
    checkpoint written before, in or after it is the same.

    Tensors and plain types only: ``torch.load(weights_only=True)`` reads the checkpoint.

    Where a submodule was replaced by ``torch.compile(submodule)``, its tensors keep the names they have in it,
    without ``_orig_mod.``, so that the plain model loads the checkpoint too; with that prefix it is read as well.

    Warns:
        UserWarning: the checkpoint was written without this callback; or it is written between two optimizer steps, in
            one or while gradients are accumulated.

    Raises:
        ValueError: on resuming with another number of processes or on another kind of device than the checkpoint's;
            with loaders that draw from other generators; from between two optimizer steps; within an epoch of loaders
            of which only some have a ``state_dict``. The way out is named, and the checkpoint can be resumed without
            this callback.

    Example:
        >>> trainer = Trainer(callbacks=[ExactResume()])  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._replay: Replay | None = None
        self._loaded: dict[str, Any] | None = None  # this rank's part of the checkpoint, until it is carried out
        self._states: dict[str, Any] | None = None  # generators that are still to be set
        self._logged: list[dict[str, Any]] = []  # sums of an interrupted epoch, until they are put back
        self._outside: dict[str, Any] | None = None  # generators of the training, while validation has its own

    # -- saving --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What every rank has to remember; all ranks must call it. Empty outside of `fit`."""
        if self._trainer is None or self._replay is None:
            return {}
        trainer, place = self._trainer, ends.place(self._trainer)
        ahead = len(getattr(fetcher_of(trainer), "batches", ()))
        ours = {
            "device": trainer.strategy.root_device.type,
            "generators": self._outside or self._states or self._generators(),
            "place": place,
            "epoch": self._replay.state(ahead) if place == ends.WITHIN else None,
            "logged": [] if place == ends.BETWEEN else means.sums(trainer),
            "within": between_steps(trainer),
            "buffers": own_buffers.collect(trainer.lightning_module) if trainer.world_size > 1 else {},
        }
        ranks = _from_all_ranks(ours, trainer)
        own_buffers.drop_common_(ranks)
        return {
            "version": VERSION,
            "world_size": trainer.world_size,
            "ranks": ranks,
            "births": [None if o is None else o.birth_death_state() for o in _wrappers(trainer)],
        }

    # -- loading -------------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take this rank's part, or say why it cannot be resumed from."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        name_all_plainly_(trainer, pl_module)
        pair_averages(trainer, pl_module)
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if not state:
            warnings.warn(
                "ExactResume: the checkpoint was written without this callback and holds no generators: the resumed "
                "run goes on, but not as the interrupted one would have; the checkpoints that it writes can be "
                "resumed exactly",
                stacklevel=2,
            )
            return
        ours = part_of_rank(state, trainer)
        if ours["place"] == ends.LAST:
            ends.finish(checkpoint["loops"]["fit_loop"])
        self._loaded = {**ours, "births": state.get("births", [])}

    # -- in the loop ---------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Become the first callback: what others draw in their hooks comes after the generators are set."""
        if stage != "fit":
            return
        self._trainer, self._replay, self._loaded, self._states, self._logged = trainer, None, None, None, []
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.remove(self)
        callbacks.insert(0, self)
        name_all_plainly_(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the loaders, and let an interrupted epoch go on where it was."""
        name_all_plainly_(trainer, pl_module)
        self._watch(trainer)
        self._isolate_validation(trainer)
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            for wrapper, births in zip(_wrappers(trainer), loaded["births"], strict=False):
                if wrapper is not None and births is not None:
                    wrapper.load_birth_death_state(births)
            own_buffers.restore_(pl_module, loaded.get("buffers", {}))
            self._states = loaded["generators"]
            self._logged = loaded["logged"]
            if loaded["place"] == ends.LAST:
                end_epoch_without_validation(trainer)
            if loaded["epoch"] is not None:
                self._go_on(trainer, loaded["epoch"])
            if loaded["place"] != ends.WITHIN:
                self._give_back(trainer)
        iter(fetcher_of(trainer))

    def _watch(self, trainer: Trainer) -> bool:
        """Stand between the fetcher and its loaders; whether these are new ones."""
        loader = training_loader(trainer)
        if self._replay is not None and self._replay.loader is loader:
            return False
        self._replay = Replay(loader, self._set_generators)
        fetcher_of(trainer).setup(self._replay)
        return True

    def _go_on(self, trainer: Trainer, epoch: dict[str, Any]) -> None:
        assert self._replay is not None
        if not any(self._replay.stateful):
            # Lightning warns of loaders that it cannot resume; these are.
            warnings.filterwarnings("ignore", ".*your dataloader is not resumable")
            self._replay.go_on(epoch)
        elif all(self._replay.stateful):
            # Lightning loads their states when it makes them, and never if an optimizer wanted to know their length
            # before the checkpoint was read.
            self._replay.go_on(epoch, iterators_exist=not load_loader_states(trainer))
        else:
            raise ValueError(
                "ExactResume: the checkpoint was written within an epoch, and only some of the training loaders have "
                "a state_dict; give it to all or to none, or resume from a checkpoint of the end of an epoch"
            )

    def _isolate_validation(self, trainer: Trainer) -> None:
        """Give the generators back after each validation as they were before it (its loaders draw before any hook)."""
        loop = trainer.fit_loop.epoch_loop.val_loop
        plain: Callable[[], Any] = type(loop).run.__get__(loop)

        def run() -> Any:
            self._outside = self._states or self._generators()
            try:
                return plain()
            finally:
                self._restore_(self._outside)
                self._outside = None

        loop.run = run  # type: ignore[method-assign]

    def _generators(self) -> dict[str, Any]:
        return {"process": generators.collect(), "own": {} if self._replay is None else self._replay.states()}

    def _restore_(self, states: dict[str, Any]) -> None:
        if self._replay is not None:
            self._replay.restore_(states["own"])
        generators.restore_(states["process"])

    def _set_generators(self) -> None:
        """At each of the moments at which the interrupted run would have used them first."""
        if self._states is not None:
            self._restore_(self._states)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the generators, if the checkpoint was written at the end of an epoch."""
        if self._states is not None:
            forget_resuming(trainer)
        if self._watch(trainer):
            iter(fetcher_of(trainer))
        self._set_generators()
        self._states = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The first batch is there, and may have drawn when it was moved to the device: the generators are at work."""
        self._states = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Put back what the epoch had logged."""
        self._give_back(trainer)

    def _give_back(self, trainer: Trainer) -> None:
        logged, self._logged = self._logged, []
        means.give_back(trainer, logged)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the generators, if the checkpoint was written just before the epoch's last hooks."""
        if self._states is not None:
            ends.begin_anew(trainer)
        self._set_generators()
        self._states = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave validation as it was."""
        vars(trainer.fit_loop.epoch_loop.val_loop).pop("run", None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave validation as it was."""
        self.teardown(trainer, pl_module, "fit")


def _wrappers(trainer: Trainer) -> list[BirthDeathOptimizer | None]:
    """The trainer's optimizers; ``None`` in the place of each that lets no unit die and be born."""
    return [o if isinstance(o, BirthDeathOptimizer) else None for o in trainer.optimizers]


def _from_all_ranks(ours: dict[str, Any], trainer: Trainer) -> list[dict[str, Any]]:
    if trainer.world_size == 1 or not dist.is_initialized():
        return [ours]
    out: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(out, ours)
    return out
