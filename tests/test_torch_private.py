"""Each private name of torch still does what the package takes it to do; a change in one fails here."""

import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from torch_meanfield import _torch


def test_untransformed_takes_off_gradients_and_has_no_value_under_vmap():
    x = torch.randn(3)
    assert _torch.untransformed(x) is x
    seen = []
    torch.func.grad(lambda t: (seen.append(_torch.untransformed(t)), t.sum())[1])(x)
    assert torch.equal(seen[0], x) and not torch._C._functorch.is_gradtrackingtensor(seen[0])
    torch.vmap(lambda t: (seen.append(_torch.untransformed(t)), t)[1])(x)
    assert seen[1] is None


def test_transforms_and_modes_are_told():
    assert not _torch.is_watched()
    seen = []
    torch.vmap(lambda t: (seen.append(_torch.is_watched()), t)[1])(torch.randn(3))
    for mode in (TorchFunctionMode(), TorchDispatchMode()):
        with mode:
            seen.append(_torch.is_watched())
    assert seen == [True] * 3 and not _torch.is_watched()


def test_multiplied_has_the_bits_and_gradients_of_single_multiplications():
    tensors = [torch.randn(3, 2, requires_grad=True), torch.randn(4, requires_grad=True)]
    factors = torch.randn(2, requires_grad=True)
    together = _torch.multiplied(tensors, list(factors.unbind()))
    apart = [t * f for t, f in zip(tensors, factors.unbind(), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
    grads = [torch.autograd.grad(sum(t.sin().sum() for t in out), [*tensors, factors]) for out in (together, apart)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_version_of_counts_in_place_writes():
    x = torch.zeros(2)
    before = _torch.version_of(x)
    assert _torch.version_of(x.add_(1)) == before + 1
    with torch.inference_mode():
        assert _torch.version_of(torch.zeros(2)) == -1


def test_is_batch_norm_knows_the_synchronised_one_and_no_other_norm():
    assert all(_torch.is_batch_norm(k) for k in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm))
    assert not any(_torch.is_batch_norm(k) for k in (nn.LayerNorm, nn.InstanceNorm1d, nn.Linear))


def test_in_backward_tells_a_recomputed_forward_pass():
    seen = []

    def function(x):
        seen.append(_torch.in_backward())
        return x.sin()

    checkpoint(function, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert seen == [False, True]


@pytest.mark.parametrize("of", ["parameters", "buffers", "children"])
def test_what_a_module_holds_is_the_dictionary_itself(of):
    model = nn.Sequential(nn.BatchNorm1d(2))
    module = model if of == "children" else model[0]
    own = getattr(_torch, f"{of}_of")(module)
    public = {"parameters": module.named_parameters, "buffers": module.named_buffers, "children": module.named_children}
    assert own == dict(public[of]())
    name = next(iter(own))
    own[name] = None
    assert getattr(module, name) is None


@pytest.mark.parametrize(
    ("register", "of"),
    [
        ("register_forward_hook", _torch.forward_hooks),
        ("register_forward_pre_hook", _torch.forward_pre_hooks),
        ("register_full_backward_hook", _torch.backward_hooks),
        ("register_full_backward_pre_hook", _torch.backward_pre_hooks),
        ("register_state_dict_post_hook", _torch.state_dict_hooks),
    ],
)
def test_hooks_of_a_module(register, of):
    module, hook = nn.Linear(2, 2), lambda *_: None
    handle = getattr(module, register)(hook)
    assert list(of(module).values()) == [hook]
    handle.remove()
    assert not of(module)


def test_pruned_name_is_that_of_the_masked_parameter():
    module = nn.Linear(2, 2)
    torch.nn.utils.prune.identity(module, "weight")
    (hook,) = _torch.forward_pre_hooks(module).values()
    assert _torch.pruned_name(hook) == "weight"


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        lambda m: m.register_full_backward_hook(lambda *_: None),
        lambda m: m.register_full_backward_pre_hook(lambda *_: None),
        lambda m: nn.modules.module.register_module_forward_hook(lambda *_: None),
        lambda m: nn.modules.module.register_module_forward_pre_hook(lambda *_: None),
        lambda m: nn.modules.module.register_module_full_backward_hook(lambda *_: None),
        lambda m: nn.modules.module.register_module_full_backward_pre_hook(lambda *_: None),
    ],
)
def test_a_module_with_a_hook_is_not_called_plainly(register):
    module = nn.Linear(2, 2)
    assert _torch.is_called_plainly(module)
    handle = register(module)
    assert not _torch.is_called_plainly(module)
    handle.remove()
    assert _torch.is_called_plainly(module)


def test_a_module_whose_forward_is_overridden_is_not_called_plainly():
    module = nn.Linear(2, 2)
    module.forward = lambda x: x
    assert not _torch.is_called_plainly(module)


def test_a_compiled_module_is_not_called_plainly():
    module = nn.Linear(2, 2)
    module.compile(backend="eager")
    assert not _torch.is_called_plainly(module)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolve_is_the_layer_with_another_weight(dims):
    layer = getattr(nn, f"Conv{dims}d")(4, 4, 3, stride=2, padding=1, padding_mode="circular", groups=2)
    x = torch.randn(2, 4, *[7] * dims)
    assert torch.equal(_torch.convolve(layer, x, layer.weight, layer.bias), layer(x))
    torch.testing.assert_close(_torch.convolve(layer, x, layer.weight * 2, None), 2 * (layer(x) - layer(x * 0)))


def test_may_compile_only_once_the_compiler_is_imported():
    code = (
        "import torch\nfrom torch_meanfield._torch import may_compile\nassert not may_compile()\n"
        "import torch._dynamo\nassert may_compile()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_only_what_a_compiled_function_calls_may_be_compiled_now():
    asked = []
    ask = _torch.never_compiled(lambda x: (asked.append(_torch.compiles_now()), x)[1])
    ask(torch.ones(2))
    torch.compile(lambda x: ask(x * 2) + 1, backend="eager")(torch.ones(2))
    ask(torch.ones(2))
    assert asked == [False, True, False]


def test_modules_that_were_compiled_are_told():
    module = nn.Linear(2, 2)
    assert not _torch.is_compiled(module)
    module.compile(backend="eager")
    assert _torch.is_compiled(module)
    assert [isinstance(torch.compile(nn.Linear(2, 2), backend="eager"), k) for k in _torch.compiled_modules()] == [True]


def test_never_compiled_breaks_the_graph():
    untraced = _torch.never_compiled(lambda x: x + 1)
    with pytest.raises(RuntimeError, match="(?i)disable|unsupported|graph break"):
        torch.compile(lambda x: untraced(x * 2), backend="eager", fullgraph=True)(torch.ones(2))


class Bare(Optimizer):
    """An optimizer that does not call ``Optimizer.__init__``."""

    def __init__(self):
        self.param_groups, self.state = [], {}  # the hooks behind steps look at them
        _torch.init_optimizer_hooks(self)
        _torch.patch_step(self)

    def step(self, closure=None):
        return "stepped"


class Marked(Bare):
    step = _torch.mark_hooked(lambda self, closure=None: "stepped")


def test_hooks_of_an_optimizer_that_is_made_by_hand():
    optimizer, calls = Bare(), []
    full = SGD([torch.zeros(1, requires_grad=True)], 0.1)
    for name in ("step", "state_dict", "load_state_dict"):
        for when in ("pre", "post"):
            assert _torch.optimizer_hooks(full, f"{name}_{when}") == OrderedDict()
            assert _torch.optimizer_hooks(optimizer, f"{name}_{when}") == OrderedDict()
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    assert len(_torch.optimizer_hooks(optimizer, "step_post")) == 1
    assert Bare.step.hooked and optimizer.step() == "stepped" and calls == [1]


def test_a_step_that_is_marked_is_not_patched_again():
    optimizer, calls = Marked(), []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    assert optimizer.step() == "stepped" and calls == []


def test_fused_optimizers_step_under_amp():
    parameters = [torch.zeros(1, requires_grad=True)]
    assert not _torch.steps_under_amp(SGD(parameters, 0.1))
    assert _torch.steps_under_amp(Adam(parameters, fused=True))


def test_a_compiled_module_is_held_under_its_name_and_versions_are_told():
    state = nn.Sequential(torch.compile(nn.BatchNorm1d(2), backend="eager")).state_dict()
    assert f"0.{_torch.COMPILED}.weight" in state
    assert _torch.module_versions(state)[f"0.{_torch.COMPILED}"] == {"version": 2}
    assert _torch.module_versions({}) == {}


def test_what_is_asked_of_a_lightning_trainer(tmp_path):
    pytorch = pytest.importorskip("lightning.pytorch")
    seen = {}

    class Task(pytorch.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            loss = self.layer(batch).square().mean()
            self.log("loss", loss, on_epoch=True)
            return loss

        def configure_optimizers(self):
            return SGD(self.parameters(), 0.1)

        def on_train_batch_end(self, *args):
            seen["logged"] = {key: value.value.clone() for key, value in _torch.logged_values(self.trainer).items()}
            seen["fetched"] = _torch.fetcher_of(self.trainer).fetched
            seen["batches"] = len(_torch.training_loader(self.trainer))

    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pytorch.Trainer(max_epochs=1, enable_model_summary=False, default_root_dir=tmp_path, **options)
    loader = torch.utils.data.DataLoader(torch.randn(6, 2), batch_size=2)
    trainer.fit(Task(), loader)
    assert list(seen["logged"]) == ["training_step.loss"]
    assert seen["fetched"] == seen["batches"] == 3

    loop = trainer.fit_loop
    assert loop._combined_loader_states_to_load == [] and not _torch.load_loader_states(trainer)
    loop._resuming_from_checkpoint = True
    _torch.forget_resuming(trainer)
    assert loop._resuming_from_checkpoint is False
    stepped, loop.epoch_loop.val_loop._has_run = loop.epoch_loop._batches_that_stepped, False
    _torch.end_epoch_without_validation(trainer)  # there is no validation
    assert loop.epoch_loop._batches_that_stepped == stepped + 1 and loop.epoch_loop.val_loop._has_run
