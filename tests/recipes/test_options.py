"""The options of the task: each against a few plain lines that do the same, with re-sorts forced."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from recipes.errors import BadInput
from recipes.images.data import ImageData
from recipes.images.mixup import Mixup
from recipes.images.task import ImageTask
from torch_meanfield import MeanFieldSequential, param_groups, subscribe

PLAIN = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
# Blocks that change places every few steps.
MOVING = {"depth": 20, "in_chans": 1, "horizon": 1.0, "lr": 0.05, "tau_lr_scale": 100.0}
BATCH, BATCHES = 32, 12


def _task(**options):
    seed_everything(0, verbose=False)
    return ImageTask(**{**MOVING, **options})


def _digits():
    data = ImageData(augment=False)
    data.open()
    images = data._data["train"].images
    pixels, labels = data.on_after_batch_transfer((images.pixels, images.labels), 0)
    return pixels[: BATCH * BATCHES], labels[: BATCH * BATCHES]


def _fit(task, epochs=1, callbacks=(), data=None, ckpt_path=None, **kwargs):
    """Train on the same batches in the same order; the trainer, and how often each layer was re-sorted."""
    moved = []
    kwargs = {"enable_checkpointing": False, "limit_val_batches": 0, **PLAIN, **kwargs}
    trainer = Trainer(max_epochs=epochs, callbacks=list(callbacks), **kwargs)
    loader = DataLoader(TensorDataset(*_digits()), BATCH)
    given = {"datamodule": data} if data else {"train_dataloaders": loader, "val_dataloaders": loader}
    with subscribe(lambda motion: moved.append(motion.cause)):
        trainer.fit(task, **given, ckpt_path=ckpt_path)
    return trainer, moved


def _same(ours, theirs):
    theirs = dict(theirs)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def _reference(task, accumulate=1, clip=None, precision=torch.float32, smoothing=0.0):
    """The training loop anyone would write."""
    net, (images, labels) = task.net.train(), _digits()
    optimizer = torch.optim.SGD(param_groups(net, **task.groups), momentum=0.9)
    steps = math.ceil(BATCHES / accumulate)
    drops = [max(1, round(steps * share)) for share in (0.5, 0.75)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, 0.1)
    losses = []
    for i, (x, y) in enumerate(zip(images.split(BATCH), labels.split(BATCH), strict=True), start=1):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = F.cross_entropy(net(x), y, label_smoothing=smoothing)
        losses.append(loss.item())
        (loss / accumulate).backward()
        if i % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return net, sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("flags", "model", "plain"),
    [
        ({}, {}, {}),
        ({"gradient_clip_val": 0.2}, {}, {"clip": 0.2}),
        ({"accumulate_grad_batches": 2}, {}, {"accumulate": 2}),
        ({"precision": "bf16-mixed"}, {}, {"precision": torch.bfloat16}),
        ({}, {"label_smoothing": 0.2}, {"smoothing": 0.2}),
    ],
)
def test_the_trainers_flags_and_smoothing_do_what_a_plain_loop_does(flags, model, plain):
    task = _task(**model)
    trainer, moved = _fit(task, **flags)
    assert moved.count("resort") >= 2
    net, loss = _reference(_task(), **plain)
    assert _same(task.net.state_dict(), net.state_dict())
    assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(loss, rel=1e-4)
    if flags or model:  # and it is not what happens without the option
        assert not _same(_reference(_task())[0].state_dict(), net.state_dict())


def test_smoothing_is_of_training_alone():
    data = ImageData(augment=False)
    losses = []
    for smoothing in (0.0, 0.3):
        task = _task(label_smoothing=smoothing)
        losses.append(Trainer(**PLAIN, limit_test_batches=1).test(task, data, verbose=False)[0]["test_loss"])
    assert losses[0] == losses[1]


def test_channels_last_is_the_layout_of_weights_and_images_and_stays_it():
    layout = {"memory_format": torch.channels_last}
    task, seen = _task(channels_last=True), []
    task.net.stage2.register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous(**layout)))
    _, moved = _fit(task)
    assert "resort" in moved and len(seen) == BATCHES and all(seen)
    kernels = [p for p in task.net.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert len(kernels) > 10 and all(p.is_contiguous(**layout) for p in kernels)
    plain, task = _task().eval(), _task(channels_last=True).eval()
    assert not any(p.is_contiguous(**layout) for p in plain.net.parameters() if p.ndim == 4 and min(p.shape) > 1)
    images = _digits()[0][:8]
    torch.testing.assert_close(plain(images), task(images), rtol=1e-4, atol=1e-5)


@pytest.fixture
def graphs(monkeypatch):
    """What the compiler saw; it is the real one but for code generation, which takes minutes."""
    seen, compile_ = [], nn.Module.compile

    def eager(graph, inputs):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_(module, backend=eager))
    torch.compiler.reset()
    return seen


def test_a_compiled_network_trains_alike_and_its_checkpoint_names_are_plain(graphs):
    task, plain = _task(compile=True), _task()
    _, moved = _fit(task)
    _fit(plain)
    assert graphs and moved.count("resort") >= 2
    assert _same(task.state_dict(), plain.state_dict())
    assert not any("_orig_mod" in name for name in task.state_dict())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own look
def test_units_and_blocks_of_a_compiled_network_are_replaced_too(graphs):
    task = _task(compile=True, birth_death=True, birth_death_every=6)
    trainer, moved = _fit(task, data=ImageData(batch_size=BATCH), limit_train_batches=BATCHES)
    optimizer = trainer.optimizers[0]
    assert graphs and optimizer.settings.batch_size == BATCH  # which no layer could have shown
    assert optimizer.clock == BATCHES and optimizer.settings.every == 6
    assert "birth_death" in moved and task.born > 0


def test_mixup_is_torchvisions_with_draws_of_its_own():
    images, labels = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4, 5])
    mix = Mixup(0.4, 10, seed=5)
    torch.manual_seed(1)
    first, targets = mix(images, labels, (0, 2, 7))
    after = torch.rand(())
    torch.manual_seed(2)
    again, _ = mix(images, labels, (0, 2, 7))
    assert torch.equal(first, again)  # whatever the global generator's state, which is left alone
    torch.manual_seed(1)
    assert after == torch.rand(())
    share = targets[0, 0]
    assert 0 < share < 1
    assert torch.allclose(targets.sum(1), torch.ones(6)) and (targets > 0).sum() == 12
    assert torch.allclose(first, share * images + (1 - share) * images.roll(1, 0), atol=1e-6)
    shares = [float(mix(images, labels, (0, 0, i))[1][0, 0]) for i in range(400)]
    drawn = [float(mix(images, labels, place)[1][0, 0]) for place in ((1, 0, 0), (0, 1, 0))]
    assert len({*shares, *drawn}) == 402  # ranks, epochs and batches differ
    # Beta(a, a) has mean 1/2 and variance 1 / (8 a + 4)
    assert torch.tensor(shares).mean() == pytest.approx(0.5, abs=0.06)
    assert torch.tensor(shares).var() == pytest.approx(1 / 7.2, rel=0.15)
    torch.manual_seed(0)
    theirs = v2.MixUp(alpha=0.4, num_classes=10)(images, labels)
    assert targets.shape == theirs[1].shape and targets.dtype == theirs[1].dtype


def test_both_twins_mix_alike_and_errors_count_against_the_larger_share():
    seen = {}

    def batches(**options):
        task = _task(mixup=1.0, **options)
        step = task._step

        def record(images, targets, split):
            logits = task(images).detach()
            seen.setdefault(len(options), []).append((images, targets, logits))
            return step(images, targets, split)

        task._step = record
        trainer, _ = _fit(task)
        return trainer

    field, _ = batches(), batches(learn_tau=False)
    assert len(seen[0]) == len(seen[1]) == BATCHES
    for (x, y, _), (u, v, _) in zip(seen[0], seen[1], strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
    wrong = [float((logits.argmax(1) != y.argmax(1)).float().mean()) for _, y, logits in seen[0]]
    assert float(field.callback_metrics["train_error"]) == pytest.approx(100 * sum(wrong) / BATCHES, abs=1e-3)


class Shadow(Callback):
    """The exponential moving average in plain words: by name, with blocks followed by hand."""

    def __init__(self, decay):
        self.decay, self.average, self.resorts = decay, None, 0

    def on_train_start(self, trainer, pl_module):
        self.layers = {name: m for name, m in pl_module.named_modules() if isinstance(m, MeanFieldSequential)}
        self.handle = subscribe(self.follow, pl_module)

    def follow(self, motion):
        name = next((n for n, layer in self.layers.items() if layer is motion.population.owner), None)
        if name is None or self.average is None:
            return
        self.resorts += 1
        old = dict(self.average)
        for key in old:
            block, _, rest = key.removeprefix(f"{name}.").partition(".")
            if key.startswith(f"{name}.tau_axis."):
                self.average[key] = old[key][motion.index]
            elif key.startswith(f"{name}."):
                self.average[key] = old[f"{name}.{int(motion.index[int(block)])}.{rest}"]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = {k: v.detach().clone() for k, v in pl_module.state_dict().items()}
        if self.average is None:
            self.average = now
        for key, value in now.items():
            self.average[key] = (self.decay * self.average[key] + (1 - self.decay) * value).to(value.dtype)

    def on_train_epoch_end(self, trainer, pl_module):
        self.handle.remove()


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
@pytest.mark.filterwarnings("ignore:Shadow.average holds:RuntimeWarning")  # the one of a fit that has ended
def test_the_average_of_the_weights_follows_the_blocks_and_is_what_is_kept():
    shadow, task = Shadow(0.9), _task(ema=0.9)
    _fit(task, callbacks=[shadow])
    assert shadow.resorts >= 2
    # In whatever order the places are: averaged times need not be ascending.
    for name, value in task.state_dict().items():
        torch.testing.assert_close(value, shadow.average[name], rtol=1e-4, atol=1e-5, msg=name)
    plain = _task()
    _fit(plain)
    assert not torch.allclose(plain.net.stem.weight, task.net.stem.weight)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
@pytest.mark.parametrize("options", [{"ema": 0.9}, {"mixup": 0.5}, {"birth_death": True, "birth_death_every": 5}])
def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path, options):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 0

    def run(folder, callbacks=(), ckpt_path=None, seed=0):
        task = _task(**options)
        seed_everything(seed, verbose=False)
        saved = ModelCheckpoint(tmp_path / folder, save_last=True, save_on_train_epoch_end=True)
        trainer, moved = _fit(
            task,
            epochs=2,
            callbacks=[saved, *callbacks],
            data=ImageData(batch_size=BATCH),
            ckpt_path=ckpt_path,
            enable_checkpointing=True,
            limit_train_batches=BATCHES,
            limit_val_batches=1,
        )
        return trainer, task, moved

    unbroken, task, moved = run("unbroken")
    assert "resort" in moved
    run("broken", [Stop()])
    # Under another seed: what is drawn must come from the checkpoint.
    resumed, again, _ = run("resumed", ckpt_path=tmp_path / "broken" / "last.ckpt", seed=7)
    assert unbroken.global_step == resumed.global_step == 2 * BATCHES
    assert _same(task.state_dict(), again.state_dict())
    assert task.born == again.born
    assert bool(task.born) == ("birth_death" in options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, "--model.label_smoothing 1.0: pass a number from 0 to below 1"),
        ({"mixup": -0.1}, "--model.mixup -0.1: pass a positive number, or 0 for none"),
        ({"mixup": math.nan}, "--model.mixup nan"),
        ({"ema": 1.0}, "--model.ema 1.0: pass a decay between 0 and 1, or null"),
        ({"birth_death_every": 0}, "--model.birth_death_every 0: pass 1 or more"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(BadInput, match=message):
        ImageTask(**options)
