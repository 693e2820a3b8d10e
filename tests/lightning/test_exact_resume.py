"""Runs resumed from every checkpoint of a run, with all kinds of loaders, against the run itself."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from torch_meanfield import BirthDeathOptimizer, subscribe
from torch_meanfield.lightning import ExactResume
from torch_meanfield.lightning.resume.plain_names import name_plainly_

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
EPOCHS, BATCHES = 3, 4


class Images(Dataset):
    """Numbered samples, augmented where they are loaded: in the workers, if there are any."""

    def __len__(self):
        return 4 * BATCHES

    def __getitem__(self, i):
        return torch.tensor(i), torch.randn(3) + random.random() + np.random.rand()


class Stream(IterableDataset):
    """The same without a length."""

    def __iter__(self):
        for i in torch.randperm(4 * BATCHES).tolist():
            yield Images()[i]


class Resumable:
    """A loader that knows itself where it was."""

    def __init__(self):
        self.at, self.order = 0, []

    def __iter__(self):
        if self.at in (0, BATCHES):
            self.at, self.order = 0, torch.randperm(BATCHES).tolist()
        while self.at < BATCHES:
            self.at += 1
            yield torch.tensor([self.order[self.at - 1]]), torch.randn(1, 3)

    def __len__(self):
        return BATCHES

    def state_dict(self):
        return {"at": self.at, "order": self.order}

    def load_state_dict(self, state):
        self.at, self.order = state["at"], list(state["order"])


class OwnGenerator:
    """A sampler of a make that nobody knows, drawing from its own generator."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __iter__(self):
        return iter(torch.randperm(4 * BATCHES, generator=self.generator).tolist())

    def __len__(self):
        return 4 * BATCHES


def _with_generator():
    generator = torch.Generator().manual_seed(7)
    return DataLoader(Images(), 4, sampler=RandomSampler(Images(), generator=generator), generator=generator)


LOADERS = {
    "shuffled": lambda: DataLoader(Images(), 4, shuffle=True),
    "own generator": _with_generator,
    "own sampler": lambda: DataLoader(Images(), 4, sampler=OwnGenerator()),
    "two loaders": lambda: {"a": DataLoader(Images(), 4, shuffle=True), "b": DataLoader(Images(), 8, shuffle=True)},
    "without a length": lambda: DataLoader(Stream(), 4),
    "resumable": Resumable,
}


class Task(LightningModule):
    """Draws from all three generators in each step: dropout, and a mixture of neighbours."""

    def __init__(self, loader="shuffled", length_wanted=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 1))
        self.loader, self.length_wanted = loader, length_wanted
        self.trace, self.means = [], []

    def training_step(self, batch, batch_idx):
        parts = batch.values() if isinstance(batch, dict) else [batch]
        x = torch.cat([part[1] for part in parts])
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        self.trace.append((self.current_epoch, batch_idx, [part[0].tolist() for part in parts], drawn))
        loss = (self.net(x * drawn[0] + x.flip(0) * drawn[1]) - drawn[2]).square().mean()
        self.log("mean", loss, on_epoch=True, on_step=False, batch_size=4)
        self.log("largest", loss, on_epoch=True, on_step=False, reduce_fx="max", batch_size=4)
        return loss

    def on_train_epoch_start(self):
        self.trace.append(("epoch", torch.rand(()).item()))

    def on_train_epoch_end(self):
        self.trace.append(("epoch ends", torch.rand(()).item()))

    def on_train_start(self):
        torch.rand(3), random.random()  # once in each piece: must not matter

    def on_fit_start(self):
        torch.rand(3), random.random()

    def validation_step(self, batch, batch_idx):
        torch.rand(())

    def configure_optimizers(self):
        if self.length_wanted:
            assert self.trainer.estimated_stepping_batches
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5), "interval": "step"}]

    def train_dataloader(self):
        return LOADERS[self.loader]()

    def val_dataloader(self):
        return DataLoader(Images(), 8)


class Means(Callback):
    """What the epochs logged."""

    def on_train_epoch_end(self, trainer, pl_module):
        names = ("mean", "largest")
        pl_module.means.append((trainer.current_epoch, *(trainer.callback_metrics[name].item() for name in names)))


class SaveAtEnd(Checkpoint):
    """A checkpoint when the epoch is over."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/end={trainer.current_epoch}.ckpt")


def _fit(folder, ckpt_path=None, *, exact=True, seed=0, task=None, callbacks=(), **kwargs):
    seed_everything(seed, verbose=False)
    task = task or Task()
    saving = [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1), SaveAtEnd()]
    saving *= ckpt_path is None
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Means(), *saving, *([ExactResume()] if exact else []), *callbacks], default_root_dir=folder,
        enable_checkpointing=bool(saving), **{"num_sanity_val_steps": 0, "max_epochs": EPOCHS, **kwargs},
    )  # fmt: skip
    trainer.fit(task, ckpt_path=ckpt_path)
    return trainer, task


def _same(task, whole):
    """Whether the resumed piece is the end of the whole run."""
    assert task.trace and task.trace == whole.trace[-len(task.trace) :]
    assert task.means and task.means == whole.means[-len(task.means) :]
    assert all(torch.equal(a, b) for a, b in zip(task.state_dict().values(), whole.state_dict().values(), strict=True))
    a, b = task.trainer.optimizers[0].state_dict(), whole.trainer.optimizers[0].state_dict()
    assert a["param_groups"] == b["param_groups"]
    for i, state in a["state"].items():
        assert torch.equal(state["momentum_buffer"], b["state"][i]["momentum_buffer"])


@pytest.mark.parametrize("loader", LOADERS)
def test_a_run_resumed_from_any_of_its_checkpoints_is_the_run(tmp_path, loader):
    _, whole = _fit(tmp_path, task=Task(loader))
    for step in range(1, EPOCHS * BATCHES):
        path = tmp_path / f"step={step}.ckpt"
        torch.load(path, weights_only=True)  # tensors and plain types
        _, task = _fit(tmp_path, path, seed=99, task=Task(loader))
        _same(task, whole)
        before = (2 + BATCHES) * ((step - 1) // BATCHES) + 1 + (step - 1) % BATCHES + 1  # with what the hooks traced
        assert len(task.trace) == len(whole.trace) - before
    for epoch in range(EPOCHS - 1):
        _same(_fit(tmp_path, tmp_path / f"end={epoch}.ckpt", seed=99, task=Task(loader))[1], whole)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_are_brought_back_to_where_they_were(tmp_path, monkeypatch, persistent):
    options = {"shuffle": True, "num_workers": 2, "persistent_workers": persistent}
    monkeypatch.setitem(LOADERS, "workers", lambda: DataLoader(Images(), 4, **options))
    _, whole = _fit(tmp_path, task=Task("workers"))
    for step in (2, BATCHES, BATCHES + 3):
        _same(_fit(tmp_path, tmp_path / f"step={step}.ckpt", seed=99, task=Task("workers"))[1], whole)


@pytest.mark.filterwarnings("ignore:.*checkpoint that ended before the epoch ended")
def test_without_the_callback_the_order_of_the_first_epoch_comes_again(tmp_path):
    _, whole = _fit(tmp_path, exact=False)
    orders = [[entry[2] for entry in whole.trace if entry[0] == epoch] for epoch in range(EPOCHS)]
    _, task = _fit(tmp_path, tmp_path / "end=0.ckpt", exact=False)
    assert [entry[2] for entry in task.trace if entry[0] == 1] == orders[0] != orders[1]
    _, task = _fit(tmp_path, tmp_path / f"step={BATCHES + 2}.ckpt", exact=False)
    used = {i for batch in orders[1][:2] for i in batch[0]}
    assert used & {i for entry in task.trace if entry[0] == 1 for i in entry[2][0]}  # and others not at all


class SaveWhenValidated(Callback):
    """A checkpoint after each validation, as a ModelCheckpoint with a monitor writes them."""

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/validated={trainer.global_step}.ckpt")


@pytest.mark.parametrize("options", [{"val_check_interval": 2}, {"limit_val_batches": 0}, {"limit_train_batches": 3}])
def test_checkpoints_around_validation(tmp_path, options):
    _, whole = _fit(tmp_path, callbacks=[SaveWhenValidated()], **options)
    written = sorted(tmp_path.glob("validated=*.ckpt"))
    assert bool(written) is ("limit_val_batches" not in options)
    total = whole.trainer.global_step
    for path in [*written, *(tmp_path / f"step={step}.ckpt" for step in range(1, total))]:
        if path.stem != f"validated={total}":
            _same(_fit(tmp_path, path, seed=99, **options)[1], whole)


def test_validation_does_not_change_the_training(tmp_path):
    _, often = _fit(tmp_path / "often", val_check_interval=1)
    _, never = _fit(tmp_path / "never", limit_val_batches=0)
    assert often.trace == never.trace


@pytest.mark.parametrize("loader", ["shuffled", "resumable"])
def test_an_optimizer_may_ask_for_the_length_of_the_training(tmp_path, loader):
    _, whole = _fit(tmp_path, task=Task(loader, length_wanted=True))
    for step in (2, BATCHES, BATCHES + 1):
        _same(_fit(tmp_path, tmp_path / f"step={step}.ckpt", seed=99, task=Task(loader, length_wanted=True))[1], whole)


def test_loaders_made_anew_in_each_epoch(tmp_path):
    options = {"reload_dataloaders_every_n_epochs": 1}
    _, whole = _fit(tmp_path, **options)
    for step in (2, BATCHES, BATCHES + 1):
        _same(_fit(tmp_path, tmp_path / f"step={step}.ckpt", seed=99, **options)[1], whole)


def test_a_run_is_prolonged_from_what_was_saved_after_it(tmp_path):
    short, _ = _fit(tmp_path, max_epochs=1)
    short.save_checkpoint(tmp_path / "end.ckpt")
    _, whole = _fit(tmp_path / "whole", max_epochs=2)
    _same(_fit(tmp_path, tmp_path / "end.ckpt", seed=99, max_epochs=2)[1], whole)


def test_the_scaler_is_in_lightnings_checkpoint(tmp_path):
    from lightning.pytorch.plugins import MixedPrecision

    def plugin(scale):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}

    def scaler_of(trainer):
        return trainer.precision_plugin.scaler.state_dict()

    whole, task = _fit(tmp_path, **plugin(1024.0))
    resumed, again = _fit(tmp_path, tmp_path / "step=5.ckpt", seed=99, **plugin(2.0))
    assert scaler_of(whole)["scale"] > 1024.0 and scaler_of(whole) == scaler_of(resumed)
    _same(again, task)


def _edited(path, **changes):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["ExactResume"] |= {k: v for k, v in changes.items() if k != "device"}
    if "device" in changes:
        checkpoint["callbacks"]["ExactResume"]["ranks"][0]["device"] = changes["device"]
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"world_size": 4}, "written by 4 processes, this training has 1; resume with 4, or resume without"),
        ({"device": "cuda"}, "written on cuda, this training is on cpu; resume on cuda, or"),
        ({"version": 9}, "has version 9 of its state, this library reads 1"),
    ],
)
def test_what_it_cannot_continue_it_refuses(tmp_path, changes, said):
    _fit(tmp_path)
    with pytest.raises(ValueError, match=said):
        _fit(tmp_path, _edited(tmp_path / "step=5.ckpt", **changes))


def test_other_loaders_are_refused(tmp_path, monkeypatch):
    _fit(tmp_path)
    with pytest.raises(
        ValueError, match=r"draw from a generator '0.sampler.generator', which those of the checkpoint \(none\)"
    ):
        _fit(tmp_path, tmp_path / "step=5.ckpt", task=Task("own generator"))
    monkeypatch.setitem(LOADERS, "mixed", lambda: {"a": Resumable(), "b": DataLoader(Images(), 4)})
    _fit(tmp_path / "mixed", task=Task("mixed"))
    with pytest.raises(ValueError, match="only some of the training loaders have a state_dict; give it to all"):
        _fit(tmp_path, tmp_path / "mixed" / "step=5.ckpt", task=Task("mixed"))


class SaveAt(Callback):
    """A checkpoint wherever the batch ends, or in the middle of a step."""

    def __init__(self, batch, within=False):
        self.batch, self.within = batch, within

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not self.within and batch_idx == self.batch:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/at.ckpt")

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if self.within and trainer.global_step == self.batch:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/at.ckpt")


@pytest.mark.parametrize(
    ("saving", "where"),
    [
        (SaveAt(2), "between two batches whose gradients are accumulated"),
        (SaveAt(1, within=True), "in the middle of a training step"),
    ],
)
def test_a_checkpoint_between_two_steps_is_warned_of_and_refused(tmp_path, saving, where):
    options = {"accumulate_grad_batches": 2, "max_epochs": 1}
    with pytest.warns(UserWarning, match=f"is written {where}, and cannot be resumed exactly"):
        _fit(tmp_path, callbacks=[saving], **options)
    with pytest.raises(ValueError, match=f"was written {where}; resume from one that was written after an"):
        _fit(tmp_path, tmp_path / "at.ckpt", **options)


def test_accumulated_steps_resume(tmp_path):
    options = {"accumulate_grad_batches": 2, "max_epochs": 2}
    _, whole = _fit(tmp_path, **options)
    for step in (1, 2, 3):
        _same(_fit(tmp_path, tmp_path / f"step={step}.ckpt", seed=99, **options)[1], whole)


def test_a_checkpoint_without_generators_is_warned_of(tmp_path):
    _fit(tmp_path, exact=False)
    with pytest.warns(UserWarning, match="written without this callback and holds no generators"):
        _fit(tmp_path, tmp_path / f"step={BATCHES}.ckpt")


def _compiled(in_place=False):
    task = Task()
    if in_place:
        task.net.compile(backend="eager")
    else:
        task.net = torch.compile(task.net, backend="eager")
    return task


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_module_is_saved_under_its_plain_names_and_resumed(tmp_path, in_place):
    _, whole = _fit(tmp_path, task=_compiled(in_place))
    path = tmp_path / "step=6.ckpt"
    saved = torch.load(path, weights_only=True)["state_dict"]
    Task().load_state_dict(saved)
    assert not any("_orig_mod" in name for name in saved)
    _same(_fit(tmp_path, path, seed=99, task=_compiled(in_place))[1], whole)
    _same(_fit(tmp_path, path, seed=99)[1], whole)  # by the plain model


def test_a_checkpoint_with_the_prefix_is_read(tmp_path):
    _, whole = _fit(tmp_path, task=_compiled())
    path = tmp_path / "step=6.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    states = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name.replace("net.", "net._orig_mod."): value for name, value in states.items()}
    torch.save(checkpoint, path)
    _same(_fit(tmp_path, path, seed=99, task=_compiled())[1], whole)


@pytest.mark.parametrize("averages_first", [False, True])
def test_so_are_the_averages_of_a_compiled_module(tmp_path, averages_first):
    def fit(path=None, **kwargs):
        average = EMAWeightAveraging(decay=0.5)
        ours = [average, ExactResume()] if averages_first else [ExactResume(), average]
        _, task = _fit(tmp_path, path, task=_compiled(), exact=False, callbacks=ours, **kwargs)
        return task

    whole = fit()
    path = tmp_path / "step=6.ckpt"
    saved = torch.load(path, weights_only=True)
    for part in (saved["state_dict"], saved["current_model_state"]):
        assert part and not any("_orig_mod" in name for name in part)
    Task().load_state_dict(saved["state_dict"])
    _same(fit(path, seed=99), whole)


class Reborn(Task):
    """Units of its hidden layer are replaced after every second step."""

    def configure_optimizers(self):
        first, last = self.net[0], self.net[3]
        units = [(first.weight, 0), (first.bias, 0), (last.weight, 1)]
        options = {"every": 2, "births": "clone", "threshold": 0.3, "batch_size": 4}
        adam = torch.optim.Adam(self.parameters(), lr=0.1)
        return BirthDeathOptimizer(adam, self.net, populations=[units], **options)


def test_averages_follow_births_in_a_resumed_run_too(tmp_path):
    def fit(path=None, **kwargs):
        averages = [EMAWeightAveraging(decay=0.5), ExactResume()]
        return _fit(tmp_path, path, task=Reborn(), exact=False, callbacks=averages, **kwargs)[1]

    born = []
    with subscribe(lambda motion: born.append(motion.cause)):
        whole = fit()
    assert born.count("birth_death") >= 3 and born.count("follow") >= 3
    born.clear()
    with subscribe(lambda motion: born.append(motion.cause)):
        resumed = fit(tmp_path / "step=6.ckpt", seed=99)
    assert "birth_death" in born
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_versions_of_compiled_modules_are_kept(tmp_path):
    model = nn.Sequential(torch.compile(nn.Sequential(nn.BatchNorm1d(2)), backend="eager"))
    name_plainly_(model)
    versions = model.state_dict()._metadata
    assert versions["0.0"] == versions["0._orig_mod.0"] == {"version": 2}


def test_evaluation_asks_for_nothing(tmp_path):
    trainer, task = _fit(tmp_path)
    path = _edited(tmp_path / "step=5.ckpt", world_size=4)
    trainer.validate(task, ckpt_path=path, verbose=False)
    assert "run" not in vars(trainer.fit_loop.epoch_loop.val_loop)
