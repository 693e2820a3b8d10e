"""Tools that swap, wrap, re-class or re-parametrise a layer of a converted model: its step goes on acting.

Where a tool is not installed, what it does to a module is imitated in a few lines; its documentation is named.
"""

from __future__ import annotations

import copy
import pickle
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as spectral_norm_hook
from torch.nn.utils import weight_norm as weight_norm_hook

from tests.convert.networks import PlainViT, images
from torch_meanfield import conversion_report, convert, fold, resort_
from torch_meanfield.convert.stage import ConvertedStage

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:quantized..linear_dynamic. an autograd kernel"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]

TAU = [0.3, 0.9, 1.5]
STEPS = torch.tensor([0.3, 0.6, 0.6])


class Block(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm: nn.Module = nn.BatchNorm1d(6) if norm else nn.Identity()

    def branch(self, h: Tensor) -> Tensor:
        out: Tensor = self.norm(self.g(self.f(h).relu()))
        return out

    def forward(self, h: Tensor) -> Tensor:
        return h + self.branch(h)


def network(norm: bool = False) -> Any:
    torch.manual_seed(0)
    net: Any = nn.Sequential(*(Block(norm) for _ in range(3)))
    for block in net:
        if norm:
            nn.init.uniform_(block.norm.weight), nn.init.normal_(block.norm.bias)
    return net


def converted(norm: bool = False) -> Any:
    model = convert(network(norm), X)
    stage_of(model).set_tau_(TAU)
    return model


def stage_of(model: nn.Module) -> Any:
    return conversion_report(model).stages[0].module


X = torch.linspace(-1, 1, 24).view(4, 6)


def euler(net: Any, x: Tensor = X, steps: Tensor = STEPS) -> Tensor:
    """Eq. (15) written out: what the plain network ``net``, to which the same was done, gives with the steps."""
    for block, step in zip(net, steps, strict=True):
        x = x + step * (block(x) - x)
    return x


class Adapter(nn.Module):
    """PEFT's ``lora.Linear`` (peft/tuners/lora/layer.py): the layer inside, a product of two thin ones beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
        base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x))
        return out

    def merged(self) -> nn.Module:
        with torch.no_grad():
            self.base_layer.weight += self.lora_B.weight @ self.lora_A.weight
        return self.base_layer


def lora(net: Any) -> None:
    torch.manual_seed(1)
    for block in net:
        block.g = Adapter(block.g)


class LoraLinear(nn.Linear):
    """A class swapped in (loralib's ``Linear`` keeps ``weight`` and adds to what it gives)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x


def reclassed(net: Any) -> None:
    for block in net:
        block.g.__class__ = LoraLinear


def patched(net: Any) -> None:
    """kohya's sd-scripts: ``org_forward = module.forward; module.forward = self.forward``."""
    for block in net:
        inner = block.g.forward
        block.g.forward = lambda x, inner=inner: inner(x) + 0.1 * x


def hooked(net: Any) -> None:
    """Accelerate's ``add_hook_to_module``."""
    for block in net:
        block.g._old_forward = block.g.forward

        def forward(module: Any, *args: Any) -> Any:
            return module._old_forward(*args)

        block.g.forward = types.MethodType(forward, block.g)


def each(way: Any, name: str = "g") -> Any:
    def act(net: Any) -> None:
        torch.manual_seed(1)
        for block in net:
            new = way(getattr(block, name))
            if isinstance(new, nn.Module):
                setattr(block, name, new)

    return act


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def quantised(net: Any) -> None:
    for module in net.modules():
        if type(module) is nn.Linear:
            module.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(net.train(), inplace=True)


WAYS: dict[str, Any] = {
    "LoRA": lora,
    "LoRA by class": reclassed,
    "LoRA by forward": patched,
    "accelerate": hooked,
    "prune": each(lambda m: prune.l1_unstructured(m, "weight", 0.5) and None),
    "weight norm": each(lambda m: parametrizations.weight_norm(m) and None),
    "weight norm, hook": each(lambda m: weight_norm_hook(m) and None),
    "spectral norm": each(lambda m: parametrizations.spectral_norm(m) and None),
    "spectral norm, hook": each(lambda m: spectral_norm_hook(m) and None),
    "orthogonal": each(lambda m: parametrizations.orthogonal(m) and None),
    "parametrised": each(lambda m: parametrize.register_parametrization(m, "weight", Doubled()) and None),
    "replaced": each(lambda m: nn.Linear(6, 6)),
    "pruned away": each(lambda m: nn.Identity()),
    "copied": each(copy.deepcopy),
    "checkpoint wrapper": each(checkpoint_wrapper),
    "sequential": each(lambda m: nn.Sequential(m, nn.Dropout(0.0))),
    "quantised": lambda net: quantization.quantize_dynamic(net, {nn.Linear}, inplace=True),
    "quantisation aware": quantised,
}


@pytest.mark.parametrize("twin", ["itself", "copy", "pickle"])
@pytest.mark.parametrize("name", WAYS)
def test_the_step_multiplies_what_stands_in_the_layers_place(name: str, twin: str) -> None:
    if twin != "itself" and name == "LoRA by forward":
        pytest.skip("a copy of a closure is the closure itself")
    model, plain = converted(), network()
    for net in (model, plain):
        WAYS[name](net)
    if twin == "copy":
        try:
            model = copy.deepcopy(model)
        except RuntimeError as error:  # of torch's older hooks, converted or not
            assert "deepcopy protocol" in str(error)
            return
    if twin == "pickle":
        try:
            model = pickle.loads(pickle.dumps(model))
        except (AttributeError, pickle.PicklingError, RuntimeError):  # local functions and parametrised modules
            return
    torch.manual_seed(2)
    out = model(X)
    torch.manual_seed(2)
    expected = euler(plain)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(out.square().sum(), stage_of(model).tau_axis.offset)
    assert bool((gradient != 0).all())


@pytest.mark.parametrize("event", ["forward", "resort_", "step", "fold"])
def test_synchronised_norms_take_the_step_at_each_event_and_fold(event: str) -> None:
    model = converted(norm=True)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(model[0].norm, nn.SyncBatchNorm)
    if event == "resort_":
        resort_(model)
    elif event == "step":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        stage_of(model).tau_axis.offset.grad = torch.zeros(3)
        optimizer.step()
    folded = fold(model) if event == "fold" else model
    torch.testing.assert_close(folded.eval()(X), euler(network(norm=True).eval()))


def test_an_adapter_is_merged_without_a_change_and_folds() -> None:
    model = converted()
    lora(model)
    with torch.no_grad():
        before = model(X)
        with pytest.raises(ValueError, match=r"0.g is no longer plainly the Linear .*Adapter.*merge_and_unload"):
            fold(model)
        for block in model:
            block.g = block.g.merged()
        torch.testing.assert_close(model(X), before)
        folded = fold(model)
        torch.testing.assert_close(folded(X), before)
    assert conversion_report(folded).fold_error < 1e-6
    assert all(type(m) is not ConvertedStage for m in folded.modules())


def test_what_was_undone_is_as_before() -> None:
    model = converted()
    before = model(X)
    WAYS["weight norm"](model), WAYS["accelerate"](model)
    torch.testing.assert_close(model(X), before)
    for block in model:
        block.g.forward = block.g._old_forward
        parametrize.remove_parametrizations(block.g, "weight")
    torch.testing.assert_close(model(X), before)
    torch.testing.assert_close(fold(model)(X), before)


GONE: dict[str, Any] = {
    "deleted": (lambda block: delattr(block, "g"), RuntimeError),
    "renamed": (lambda block: (setattr(block, "h", nn.Linear(6, 6)), setattr(block, "g", None)), RuntimeError),
}


@pytest.mark.parametrize("event", ["forward", "resort_", "step", "fold"])
@pytest.mark.parametrize("name", GONE)
def test_a_layer_that_is_gone_is_named_at_the_next_event(name: str, event: str) -> None:
    model = converted()
    GONE[name][0](model[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    stage_of(model).tau_axis.offset.grad = torch.zeros(3)
    events: dict[str, Any] = {
        "forward": lambda: model(X),
        "resort_": lambda: resort_(model),
        "step": optimizer.step,
        "fold": lambda: fold(model),
    }
    with pytest.raises(RuntimeError, match=r"'g' of a block in slot 1 is gone.*fold\(model\)"):
        events[event]()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.look = nn.LayerNorm(6), nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        out: Tensor = x + self.look(h, h, h)[0]
        return out


def test_a_pruned_projection_inside_attention_is_scaled_or_named() -> None:
    """The attention hands out its weights, too, which no step multiplies: it cannot be multiplied as a whole."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    model: Any = convert(nn.Sequential(*(Attention() for _ in range(3))), x)
    stage_of(model).set_tau_(TAU)
    prune.l1_unstructured(model[1].look.out_proj, "weight", 0.5)
    with pytest.raises(RuntimeError, match=r"'look' of a block in slot 1.*step acts on nothing; fold\(model\)"):
        model(x)
    prune.remove(model[1].look.out_proj, "weight")
    model(x)


def test_layer_lists_by_type_see_converted_layers() -> None:
    """FLOP counters, quantisers and pruners look layers up by their class."""
    kinds = {nn.Linear: 0, Block: 0}
    for m in converted().modules():
        if type(m) in kinds:
            kinds[type(m)] += 1
    assert kinds == {nn.Linear: 6, Block: 3}


def test_a_block_replaced_by_a_plain_one_is_named_at_the_next_step() -> None:
    model = converted()
    model[1] = Block()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(X).sum().backward()
    with pytest.raises(RuntimeError, match="no longer exists"):
        optimizer.step()


def test_fold_measures_against_a_network_in_which_every_step_acts() -> None:
    model = converted()
    model[1].forward = lambda h: h + model[1].f(h)  # goes past the layer that takes the step
    with pytest.raises(ValueError, match=r"fold: 1.g .*did not run"):
        fold(model)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ["LoRA", "prune", "parametrised", "replaced", "accelerate"])
def test_a_compiled_model_takes_the_step_too(name: str, before: bool) -> None:
    model, plain = converted(), network()
    torch.compiler.reset()  # what other tests have compiled counts
    # the compiler of torch 2.6 cannot write to a module's attributes, and breaks the graph
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not torch.__version__.startswith("2.6."))
    if before:
        compiled(X)
    for net in (model, plain):
        WAYS[name](net)
    torch.testing.assert_close(compiled(X), euler(plain), rtol=1e-4, atol=1e-5)


class Gained(nn.Module):
    """A ConvNeXt block holds its layer scale itself."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.gain = nn.Linear(6, 6), nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.gain * self.f(h).tanh()


@pytest.mark.parametrize("name", ["re-classed", "pruned", "around", "past"])
def test_a_block_that_holds_the_scaled_parameter_itself(name: str) -> None:
    torch.manual_seed(0)
    model: Any = convert(nn.Sequential(*(Gained() for _ in range(3))), X)
    stage_of(model).set_tau_(TAU)
    before, block = model(X), model[1]
    if name == "re-classed":
        block.__class__ = type("Other", (Gained,), {"forward": lambda self, h: h + self.f(h)})
        with pytest.raises(RuntimeError, match="is a Other now, not the Gained it was"):
            model(X)
        return
    if name == "pruned":
        prune.l1_unstructured(block, "gain", 0.5)
        with pytest.raises(RuntimeError, match="holds its parameters in another way now"):
            model(X)
        return
    inner = block.forward
    block.forward = inner if name == "around" else lambda h: h + block.gain * block.f(h).tanh()
    if name == "around":
        block.forward = lambda h: inner(h)
        torch.testing.assert_close(model(X), before)
    resort_(model)
    torch.testing.assert_close(model(X), before)
    with pytest.raises(ValueError, match="fold: 1 is no longer plainly the Gained"):
        fold(model)


def test_a_wrapper_around_the_layers_parent_and_back() -> None:
    torch.manual_seed(0)
    x = images()
    model: Any = convert(PlainViT(), x).eval()
    stage_of(model).set_tau_([0.3, 0.9, 1.5, 2.2])
    before, inner = model(x), model.layers[1].think
    model.layers[1].think = checkpoint_wrapper(inner)
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(fold(model)(x), before)
    model.layers[1].think = inner
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(fold(model)(x), before)
