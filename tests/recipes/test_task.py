"""The published protocol in the LightningModule, and resuming a stopped run as if it had not been stopped."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from recipes.errors import BadInput
from recipes.images.data import ImageData
from recipes.images.task import ImageTask
from torch_meanfield.lightning import MeanFieldMonitor

PLAIN = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


class StopAfter(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == self.epoch


def _fit(task, data=None, callbacks=(), ckpt_path=None, **kwargs):
    kwargs = {"limit_val_batches": 0, "enable_checkpointing": False, **PLAIN, **kwargs}
    trainer = Trainer(callbacks=list(callbacks), **kwargs)
    trainer.fit(task, data or ImageData(), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(("epochs", "batches"), [(4, 8), (5, 3), (1, 4)])
def test_the_rate_falls_at_half_and_three_quarters_of_the_steps(epochs, batches):
    rates = Rates()
    task = ImageTask(8, in_chans=1, lr=0.2, tau_lr_scale=3.0)
    _fit(task, callbacks=[rates], max_epochs=epochs, limit_train_batches=batches)
    total = epochs * batches
    expected = [0.2 * 0.1 ** ((k >= round(total / 2)) + (k >= round(total * 3 / 4))) for k in range(total)]
    assert [r[0] for r in rates.seen] == pytest.approx(expected)
    assert [r[1] for r in rates.seen] == pytest.approx([3 * e for e in expected])


def test_the_optimizer_is_the_published_one_and_tau_has_no_decay():
    task = ImageTask(8, in_chans=1)
    trainer = _fit(task, max_epochs=1, limit_train_batches=2)
    weights, tau = trainer.optimizers[0].param_groups
    assert type(trainer.optimizers[0]) is torch.optim.SGD
    assert (weights["momentum"], weights["weight_decay"], tau["weight_decay"]) == (0.9, 1e-4, 0.0)
    assert (weights["initial_lr"], tau["initial_lr"]) == (0.1, 0.1)
    named = {id(p): name for name, p in task.named_parameters()}
    assert all("tau" in named[id(p)] for p in tau["params"])
    assert not any("tau" in named[id(p)] for p in weights["params"])


def test_the_twins_start_from_the_same_weights_and_see_the_same_images():
    def first_loss(**kwargs):
        seed_everything(3, verbose=False)
        task, losses = ImageTask(20, in_chans=1, **kwargs), []
        weights = {k: v.clone() for k, v in task.state_dict().items() if "tau" not in k}

        class Losses(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                losses.append(outputs["loss"].detach())

        _fit(task, callbacks=[Losses()], max_epochs=1, limit_train_batches=2)
        return weights, losses

    vanilla, losses = first_loss(learn_tau=False)
    field, their_losses = first_loss()
    moved, _ = first_loss(tau_init="random", horizon=1.0)
    assert vanilla.keys() == field.keys() == moved.keys()
    assert all(torch.equal(v, field[k]) and torch.equal(v, moved[k]) for k, v in vanilla.items())
    assert torch.equal(losses[0], their_losses[0])  # bit for bit: all steps are 1
    assert not torch.equal(losses[1], their_losses[1])  # after one step of tau they are not


def test_errors_are_percent_of_the_images():
    data = ImageData(eval_batch_size=170)
    task = ImageTask(8, in_chans=1)
    trainer = _fit(task, data, max_epochs=1, limit_train_batches=2, limit_val_batches=1.0)
    task.eval()
    batch = [data.on_after_batch_transfer(b, 0) for b in data.val_dataloader()]
    with torch.no_grad():
        wrong = sum(int((task(x).argmax(1) != y).sum()) for x, y in batch)
    assert float(trainer.callback_metrics["val_error"]) == pytest.approx(100 * wrong / 500, abs=1e-3)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the resumed run keeps its checkpoints elsewhere
def test_a_resumed_run_ends_where_the_unbroken_one_does(tmp_path):
    options = {"horizon": 1.0, "tau_lr_scale": 30.0, "in_chans": 1}

    def run(folder, callbacks=(), ckpt_path=None, seed=0):
        seed_everything(seed, verbose=False)
        task, monitor = ImageTask(20, **options), MeanFieldMonitor(1, plot=False, keep=True)
        saved = ModelCheckpoint(tmp_path / folder, save_last=True)
        trainer = _fit(
            task,
            callbacks=[monitor, saved, *callbacks],
            ckpt_path=ckpt_path,
            max_epochs=4,
            limit_train_batches=6,
            enable_checkpointing=True,
        )
        return trainer, task, monitor

    unbroken, task, monitor = run("unbroken")
    broken, *_ = run("broken", [StopAfter(1)])
    assert (unbroken.global_step, broken.global_step) == (24, 12)
    assert monitor.resorts > 0
    # Another seed: what the resumed run draws must come from the checkpoint.
    resumed, again, same = run("resumed", ckpt_path=tmp_path / "broken" / "last.ckpt", seed=7)
    assert resumed.global_step == 24
    for (name, ours), theirs in zip(task.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert same.state_dict() == monitor.state_dict()


def test_a_run_without_an_end_is_refused():
    with pytest.raises(BadInput, match=r"max_epochs"):
        _fit(ImageTask(8, in_chans=1), max_epochs=-1, limit_train_batches=2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"momentum": 1.0}, "momentum 1.0"), ({"lr": -1.0}, "lr"), ({"depth": 9}, "depth"), ({"tau_lr_scale": -1}, "tau")],
)
def test_numbers_out_of_range_are_refused_when_the_task_is_made(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ImageTask(**kwargs)
