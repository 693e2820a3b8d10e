"""Averaged copies in a training with re-sorts and births, against averages that are moved by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.trust.tools import Net, optimizer_of, train
from tools.faults.digits import BLOCKS, digits
from torch_meanfield import BirthDeathOptimizer, Motion, subscribe
from torch_meanfield.particles.averages import lineage_of
from torch_meanfield.particles.population import Stack, named_tensors

Update = Callable[[nn.Module], None]


class ByHand:
    """A moving average of every tensor, whose entries are carried along by indexing."""

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.net, self.decay = net, decay
        self.values = {k: v.detach().clone() for k, v in named_tensors(net).items()}
        self.motions = 0

    def update(self, first: bool = False) -> None:
        for k, now in named_tensors(self.net).items():
            self.values[k] = now.detach().clone() if first else self.values[k].lerp(now.detach(), 1 - self.decay)

    def carry(self, motion: Motion) -> None:
        if motion.cause == "follow":
            return
        self.motions += 1
        names = {id(t): k for k, t in named_tensors(self.net).items()}
        for i, column in enumerate(motion.population.columns):
            if isinstance(column, Stack):
                old = [self.values[names[id(t)]] for t in column.tensors]
                for place, source in enumerate(motion.index.tolist()):
                    self.values[names[id(column.tensors[place])]] = old[source].clone()
                continue
            assert column.outer == column.inner == 1
            value = self.values[names[id(column.tensor)]].index_select(column.dim, motion.index)
            if motion.born is not None and i in motion.values:
                born = column.tensor.detach().index_select(column.dim, motion.born)
                value.index_copy_(column.dim, motion.born, born)
            elif motion.born is not None:
                continue
            self.values[names[id(column.tensor)]] = value


def averaged_model(net: nn.Module) -> tuple[nn.Module, Update]:
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    return average.module, average.update_parameters


def timm_ema(net: nn.Module) -> tuple[nn.Module, Update]:
    average = pytest.importorskip("timm.utils").ModelEmaV3(net, decay=0.9)
    return average.module, average.update


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("make", [averaged_model, timm_ema])
def test_every_entry_averages_the_unit_and_the_block_that_hold_it(make: Any, made: str) -> None:
    """Made before the optimizer was wrapped, as Lightning does, or after."""
    net = Net()
    if made == "before":
        average, update = make(net)
    optimizer = optimizer_of(net)
    if made == "after":
        average, update = make(net)
    reference = ByHand(net, 0.9)
    steps = 0

    def after() -> None:
        nonlocal steps
        update(net)
        reference.update(first=steps == 0 and make is averaged_model)
        steps += 1

    with subscribe(reference.carry, model=net):
        out = train(net, optimizer, after=after)
    assert out.resorts >= 5 and out.born > 0 and reference.motions > out.resorts
    for name, value in named_tensors(average).items():
        torch.testing.assert_close(value.detach(), reference.values[name], rtol=1e-4, atol=1e-5, msg=name)


def test_an_average_made_before_the_wrapping_is_known_by_the_layer_in_it() -> None:
    net, other = Net(), Net()
    average, others = AveragedModel(net), AveragedModel(other)
    with torch.no_grad():
        for trained in (net, other):
            trained.stem.weight.add_(1.0)
    optimizer_of(net)
    assert lineage_of(average.module).following and not lineage_of(others.module).following


def _small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def _wrapped(net: nn.Sequential) -> BirthDeathOptimizer:
    units = [(net[0].weight, 0), (net[0].bias, 0), (net[2].weight, 1)]
    return BirthDeathOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net, populations=[units])


def test_an_average_follows_the_model_it_was_made_from_though_that_was_trained_before_it_was_wrapped() -> None:
    net, twin = _small(), _small()
    twin.load_state_dict(net.state_dict())  # what the averaging classes were given tells them apart, not the values
    average, second, others = AveragedModel(net), AveragedModel(net), AveragedModel(twin)
    with torch.no_grad():
        net[0].weight.add_(1.0)
    _wrapped(net)
    assert lineage_of(average.module).following and lineage_of(second.module).following
    assert not lineage_of(others.module).following
    _wrapped(twin)
    assert lineage_of(others.module) in lineage_of(twin).followers


@pytest.mark.parametrize("inside", [False, True])
def test_an_average_of_which_it_cannot_be_told_what_it_was_made_from_is_named(inside: bool) -> None:
    net = _small()
    larger = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 2))
    made_from = copy.deepcopy(net)
    average, kept = AveragedModel(nn.Sequential(made_from) if inside else made_from), AveragedModel(larger)
    del made_from, larger  # and of one of another structure nothing is said
    with pytest.warns(RuntimeWarning, match=r"averaged copy of a Sequential .*follow\(copy, model\)") as caught:
        _wrapped(net)
    assert len(caught) == 1 and ("'0' in it" in str(caught[0].message)) is inside
    assert not lineage_of(average.module).following and kept is not None


def test_lightnings_average_follows_births_though_it_is_made_before_the_optimizer(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    images, labels = digits()

    class Module(pl.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, number: int) -> Tensor:
            x, y = batch
            force = torch.randn(BLOCKS, generator=torch.Generator().manual_seed(number))
            return nn.functional.cross_entropy(self.net(x), y) + (self.net.stack.tau * force).sum()

        def configure_optimizers(self) -> Any:
            return optimizer_of(self.net)

    module = Module()
    reference = ByHand(module.net, 0.9)

    class Reference(pl.Callback):  # type: ignore[misc,name-defined]
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            reference.update(first=trainer.global_step == 1)

    ema = callbacks.EMAWeightAveraging(decay=0.9)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=16)
    trainer = pl.Trainer(
        max_epochs=1, callbacks=[ema, Reference()], default_root_dir=tmp_path, logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    causes: list[str] = []
    kept: dict[str, Tensor] = {}

    class Keep(pl.Callback):  # type: ignore[misc,name-defined]
        def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
            kept.update({k: v.detach().clone() for k, v in named_tensors(ema._average_model.module.net).items()})

    trainer.callbacks.append(Keep())
    with subscribe(reference.carry, model=module), subscribe(lambda m: causes.append(m.cause), model=module.net):
        trainer.fit(module, data)
    assert {"resort", "birth_death"} <= set(causes)
    for name, value in kept.items():
        torch.testing.assert_close(value, reference.values[name], rtol=1e-4, atol=1e-5, msg=name)
