"""Tau from its making to its checkpoint: meta device, offloading, blocks that are taken away, plain checkpoints."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_meanfield import MeanFieldResNet, MeanFieldSequential, conversion_report, convert, fold
from torch_meanfield.depth.tau_axis import TauAxis

Z = torch.linspace(-1, 1, 24).view(4, 6)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.g(self.f(h).relu())


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(_Block(), _Block(), _Block()), nn.Linear(6, 2)

    def forward(self, h: Tensor) -> Tensor:
        return self.head(self.blocks(h))


def _stack(**options: Any) -> MeanFieldSequential:
    return MeanFieldSequential(
        *(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(3)), **options
    )


def _converted(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return convert(_Plain(), Z, **options)


def _stage(model: nn.Module) -> Any:
    return conversion_report(model).stages[0].module


# -- the meta device ------------------------------------------------------------------------------------------------


def _by_init_weights(model: nn.Module) -> None:
    model.init_weights()


def _by_reset_parameters(model: nn.Module) -> None:
    """As FSDP's materialisation and torchtitan do it."""
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


@pytest.mark.parametrize("learn_tau", [True, False])
@pytest.mark.parametrize("initialise", [_by_init_weights, _by_reset_parameters, lambda model: None])
def test_a_model_made_on_the_meta_device_has_the_tau_of_a_new_one(
    initialise: Callable[[nn.Module], None], learn_tau: bool
) -> None:
    with torch.device("meta"):
        model = MeanFieldResNet(learn_tau=learn_tau)
    model.to_empty(device="cpu")
    initialise(model)
    for layer, new in zip(
        model.mean_field_layers().values(),
        MeanFieldResNet(learn_tau=learn_tau).mean_field_layers().values(),
        strict=True,
    ):
        assert torch.equal(layer.tau, new.tau)
        assert layer.tau_axis.unit_steps == new.tau_axis.unit_steps


@pytest.mark.parametrize(
    "make", [lambda: MeanFieldResNet(tau_init="random"), lambda: _stack(tau_init="random", horizon=2.0)]
)
def test_random_positions_are_drawn_after_the_meta_device(make: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    for layer in (m for m in model.modules() if isinstance(m, MeanFieldSequential)):
        assert bool((layer.steps() >= 0).all()) and not layer.tau_axis.is_fresh
        assert 0 <= layer.tau[0] and layer.tau[-1] <= layer.horizon


def test_a_reset_of_a_trained_model_resets_tau() -> None:
    model = MeanFieldResNet()
    layer = next(iter(model.mean_field_layers().values()))
    layer.set_tau_([0.5, 0.7, 2.5])
    with torch.no_grad():
        layer.tau_axis.offset.add_(0.1)
    model.init_weights()
    assert layer.steps().tolist() == [1.0, 1.0, 1.0]


def test_a_converted_model_comes_back_from_the_meta_device() -> None:
    model = _converted(horizon=1.5)
    _stage(model).set_tau_([0.1, 0.2, 0.3])
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model(Z)
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    assert _stage(empty).tau.tolist() == [0.5, 1.0, 1.5]
    empty.load_state_dict(state)
    assert torch.equal(empty(Z), expected)


# -- offloading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [_converted, lambda: _stack(horizon=1.0)])
@pytest.mark.parametrize("how", ["cpu", "cpu with buffers", "disk"])
def test_weights_that_accelerate_has_taken_away_come_back_with_their_tau(
    how: str, make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = make()
    (model if isinstance(model, MeanFieldSequential) else _stage(model)).set_tau_([0.3, 0.9, 0.7])
    expected = model(Z)
    if how == "disk":
        accelerate.disk_offload(model, str(tmp_path))
    else:
        accelerate.cpu_offload(model, offload_buffers=how != "cpu")
    for _ in range(2):
        torch.testing.assert_close(model(Z), expected)


# -- blocks without their tau ---------------------------------------------------------------------------------------


class Getter(nn.ModuleDict):
    """torchvision's IntermediateLayerGetter, create_feature_extractor of old: the children up to one."""

    def __init__(self, model: nn.Module, last: str) -> None:
        names = [n for n, _ in model.named_children()]
        super().__init__({n: m for n, m in model.named_children() if n in names[: names.index(last) + 1]})

    def forward(self, x: Tensor) -> Tensor:
        for module in self.values():
            x = module(x)
        return x


def _in_sequential(model: nn.Module) -> nn.Module:
    return nn.Sequential(*model.blocks, model.head)


def _in_list(model: nn.Module) -> nn.Module:
    return nn.ModuleList(model.blocks)


def _whole_but_for_tau(model: nn.Module) -> nn.Module:
    del model.mean_field_blocks  # a tool that removes what it does not know
    return model


@pytest.mark.parametrize("eval_first", [False, True])
@pytest.mark.parametrize("take", [lambda m: Getter(m, "head"), _in_sequential, _in_list, _whole_but_for_tau])
def test_blocks_that_train_without_their_tau_are_told_of_by_name(take: Callable[[Any], Any], eval_first: bool) -> None:
    torch.manual_seed(0)
    model = _Plain()
    model.train(not eval_first)
    convert(model, Z)
    if not hasattr(model, "mean_field_blocks"):
        pytest.skip("the stage lies elsewhere")
    stage = _stage(model)
    taken = take(model)
    taken.train()
    optimizer = torch.optim.SGD(taken.parameters(), lr=0.1)
    model(Z).sum().backward()
    with pytest.warns(RuntimeWarning, match=r"mean_field_blocks.*its tau is in no optimizer"):
        optimizer.step()
    stage.tau_axis.offset.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.optim.SGD(taken.parameters(), lr=0.1).step()


def test_tau_in_an_optimizer_that_has_not_stepped_yet_is_not_missed() -> None:
    model = _converted()
    tau = _stage(model).tau_axis.offset
    weights = torch.optim.SGD([p for p in model.parameters() if p is not tau], lr=0.1)
    later = torch.optim.SGD([tau], lr=0.1)
    model(Z).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights.step()
        later.step()


# -- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["whole", "the blocks alone", "not strict", "assigned"])
def test_a_plain_checkpoint_in_a_model_whose_tau_has_moved_says_so(how: str) -> None:
    plain, model = _Plain(), _converted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(plain.state_dict())  # nothing has moved: the network is the plain one
    torch.testing.assert_close(model(Z), plain(Z))
    _stage(model).set_tau_([0.3, 0.9, 1.5])
    options = {"not strict": {"strict": False}, "assigned": {"assign": True}}.get(how, {})
    with pytest.warns(RuntimeWarning, match=r"holds no tau; its blocks keep the steps \[0.3, 0.6, 0.6\]"):
        model.load_state_dict(plain.state_dict(), **options)
    _stage(model).tau_axis.reset_parameters()
    torch.testing.assert_close(model(Z), plain(Z))


class Pretrained(_Plain):
    """What Hugging Face's models do."""

    def save_pretrained(self, folder: Path) -> None:
        torch.save(self.state_dict(), folder / "model.pt")

    @classmethod
    def from_pretrained(cls, folder: Path) -> Pretrained:
        model = cls()
        model.load_state_dict(torch.load(folder / "model.pt"), strict=False)
        return model


def test_save_pretrained_of_a_model_whose_tau_has_moved_says_that_it_is_lost(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = convert(Pretrained(), Z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    torch.testing.assert_close(Pretrained.from_pretrained(tmp_path)(Z), model(Z))
    _stage(model).set_tau_([0.3, 0.9, 1.5])
    with pytest.warns(RuntimeWarning, match=r"from_pretrained.. makes a network that has none.*Save fold"):
        model.save_pretrained(tmp_path)
    again = convert(Pretrained(), Z)
    again.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(again(Z), model(Z))
    fold(model).save_pretrained(tmp_path)
    torch.testing.assert_close(Pretrained.from_pretrained(tmp_path)(Z), model(Z))


def test_a_model_of_hugging_face_resets_a_tau_that_its_file_lacks(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Network(transformers.PreTrainedModel):  # type: ignore[misc,name-defined]
        config_class = transformers.PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.net = _stack(horizon=1.5)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            super()._init_weights(module)
            if isinstance(module, TauAxis):
                module.reset_parameters()

    model = Network(transformers.PretrainedConfig())
    model.net.set_tau_([0.1, 0.2, 0.3])
    model.save_pretrained(tmp_path)
    assert torch.equal(Network.from_pretrained(tmp_path).net.tau, model.net.tau)
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if "tau" not in k})
    assert Network.from_pretrained(tmp_path).net.tau.tolist() == [0.5, 1.0, 1.5]
