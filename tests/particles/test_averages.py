"""Averaged copies against an average kept by particle identity."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torch_meanfield import MeanFieldSequential, follow, subscribe

N = 4


def _layer(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 3), MeanFieldSequential(*(nn.Linear(3, 3) for _ in range(N)), horizon=1.0))


class OwnAverage:
    """An average of a make the library does not know."""

    def __init__(self, model):
        self.module = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, model):
        for mine, theirs in zip(self.module.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 0.1)


def _averaged_model(model):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    average.update_parameters(model)  # the first update copies
    return average.module, average.update_parameters


def _averaged_model_without_buffers(model):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    return average.module, average.update_parameters


def _timm_ema(version):
    def make(model):
        timm_utils = pytest.importorskip("timm.utils")
        average = getattr(timm_utils, version)(model, decay=0.9)
        return average.module, average.update

    return make


def _own(model):
    average = OwnAverage(model)
    assert follow(average.module, model) == 2  # the model and its one layer
    return average.module, average.update


AVERAGES = {
    "AveragedModel": _averaged_model,
    "AveragedModel without buffers": _averaged_model_without_buffers,
    "ModelEmaV2": _timm_ema("ModelEmaV2"),
    "ModelEmaV3": _timm_ema("ModelEmaV3"),
    "follow": _own,
}


@pytest.mark.parametrize("name", AVERAGES)
def test_slots_go_on_averaging_the_same_particle(name):
    model = _layer()
    layer = model[1]
    averaged, update = AVERAGES[name](model)
    motions, order = [], list(range(N))  # order[l]: the particle in slot l of the model
    by_particle = [layer[i].weight.detach().clone() for i in range(N)]
    tau_by_particle = layer.tau.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    handle = subscribe(motions.append, model=model)
    for _ in range(60):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        layer.tau_axis.offset.grad += torch.randn(N)
        optimizer.step()
        while motions:
            order = [order[j] for j in motions.pop(0).index.tolist()]
        update(model)
        for place, i in enumerate(order):
            by_particle[i].lerp_(layer[place].weight.detach(), 0.1)
            tau_by_particle[i].lerp_(layer.tau.detach()[place], 0.1)
    handle.remove()
    assert order != list(range(N))
    for place, i in enumerate(order):
        torch.testing.assert_close(averaged[1][place].weight, by_particle[i], rtol=0, atol=1e-5)
    torch.testing.assert_close(averaged[1].tau_axis.read(), tau_by_particle[order], rtol=0, atol=1e-5)
    # and the copy computes what its particles say, in the order of their averaged times
    averaged.eval()
    x = torch.randn(5, 3)
    expected, before = averaged[0](x), 0.0
    for i in tau_by_particle.argsort(stable=True).tolist():
        expected = expected + (tau_by_particle[i] - before) * averaged[1][order.index(i)](expected)
        before = tau_by_particle[i]
    torch.testing.assert_close(averaged(x), expected, rtol=1e-4, atol=1e-5)


def test_an_average_whose_tau_crosses_is_executed_in_the_order_of_tau():
    model = _layer()
    averaged = AveragedModel(model)
    model[1].set_tau_([0.9, 0.5, 0.75, 1.0])  # places move in both; the average keeps its own times for now
    average = averaged.module[1].eval()
    assert average.tau_axis.read().tolist() == [0.5, 0.75, 0.25, 1.0]
    assert average.tau.tolist() == [0.25, 0.5, 0.75, 1.0]
    x = torch.randn(2, 3)
    expected = x
    for place in (2, 0, 1, 3):
        expected = expected + 0.25 * average[place](expected)
    torch.testing.assert_close(average(x), expected)


def test_a_plain_copy_is_a_model_of_its_own():
    model = _layer()
    twin = copy.deepcopy(model)
    before = {k: v.clone() for k, v in twin.state_dict().items()}
    model[1].set_tau_([0.9, 0.5, 0.75, 1.0])
    assert all(torch.equal(v, before[k]) for k, v in twin.state_dict().items())
    assert "'1'" in copy.deepcopy(twin[1])._label()  # known by its name in the model, wherever it goes


def test_a_resumed_average_keeps_the_places_of_its_model():
    model = _layer()
    averaged = AveragedModel(model)
    model[1].set_tau_([0.9, 0.5, 0.75, 1.0])
    saved, saved_average = copy.deepcopy(model.state_dict()), copy.deepcopy(averaged.state_dict())
    resumed = _layer(seed=1)
    resumed_average = AveragedModel(resumed)
    resumed_average.load_state_dict(saved_average)
    resumed.load_state_dict(saved)
    assert all(torch.equal(v, saved_average[k]) for k, v in resumed_average.state_dict().items())
    plain = _layer(seed=2)  # as a model by itself the average is sorted on load
    plain.load_state_dict({k.removeprefix("module."): v for k, v in saved_average.items() if k != "n_averaged"})
    assert plain[1].tau_axis.read().tolist() == [0.25, 0.5, 0.75, 1.0]
    x = torch.randn(2, 3)
    torch.testing.assert_close(plain.eval()(x), averaged.eval()(x))


def test_lightning_weight_averaging_swaps_in_what_it_averaged(tmp_path):
    pl = pytest.importorskip("lightning.pytorch")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
    outputs = {}

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = _layer()

        def training_step(self, batch, _):
            loss = self.net(batch[0]).square().mean()
            return loss + 3 * (self.net[1].tau * torch.randn(N)).sum()  # a push that makes particles cross

        def validation_step(self, batch, _):
            averaged = self.trainer.callbacks[0]._average_model.module.net
            assert not torch.equal(averaged[0].weight, self.net[0].weight)
            outputs["swapped in"] = self.net(batch[0])
            outputs["tau"] = self.net[1].tau

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 3)), batch_size=4)
    module, average = Module(), callbacks.WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.9))
    order, motions = list(range(N)), []
    tau_by_particle = module.net[1].tau.detach().clone()

    class Identity(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            while motions:
                order[:] = [order[j] for j in motions.pop(0).index.tolist()]
            for place, i in enumerate(order):
                tau_by_particle[i].lerp_(module.net[1].tau.detach()[place], 1.0 if trainer.global_step == 1 else 0.1)

    trainer = pl.Trainer(
        max_epochs=3, callbacks=[average, Identity()], default_root_dir=tmp_path, logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    with subscribe(motions.append, model=module):
        trainer.fit(module, data, data)
    assert order != list(range(N))
    torch.testing.assert_close(outputs["tau"].detach(), tau_by_particle.sort().values, rtol=0, atol=1e-5)


def test_follow_refuses_what_does_not_match():
    model = _layer()
    with pytest.raises(ValueError, match="copy has no tensor '1"):
        follow(nn.Sequential(nn.Linear(3, 3)), model)
    with pytest.raises(ValueError, match="copy is model itself"):
        follow(model, model)
    with pytest.raises(TypeError, match="copy must be a torch.nn.Module, got dict"):
        follow(dict(model.state_dict()), model)
    with pytest.raises(TypeError, match="follow: model must be a torch.nn.Module, got str"):
        follow(model, "model")


class _Renamed(nn.Module):
    """Its layer has the right tensors at '1', but the module is listed under another name."""

    def __init__(self, first, layer):
        super().__init__()
        self.add_module("layer", layer)
        self.add_module("0", first)
        self.add_module("1", layer)


class _OtherKind(MeanFieldSequential):
    pass


def test_follow_refuses_a_copy_whose_layer_is_another_module():
    model = _layer()
    kind = copy.deepcopy(model)
    kind[1].__class__ = _OtherKind
    for average in (kind, _Renamed(*copy.deepcopy(model))):
        with pytest.raises(ValueError, match="follow: copy has no MeanFieldSequential at '1'"):
            follow(average, model)
        before = {k: v.clone() for k, v in average.state_dict().items()}
        model[1].set_tau_([0.9, 0.5, 0.75, 1.0])
        assert all(torch.equal(v, before[k]) for k, v in average.state_dict().items())  # nothing was paired
