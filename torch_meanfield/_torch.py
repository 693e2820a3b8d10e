"""Every private name of torch and Lightning that the package uses, one small function each; there are none elsewhere.

Tried with torch 2.6.0 (the oldest that is supported) and 2.14.1, and with Lightning 2.6.6;
``tests/test_torch_private.py`` calls each function once, so that a version in which one of these names changes fails
there first and by name.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.optim import Optimizer

F = TypeVar("F", bound=Callable[..., Any])


# -- tensors -----------------------------------------------------------------------------------------------------


def untransformed(tensor: Tensor) -> Tensor | None:
    """``tensor`` without the wrappers of ``torch.func.grad``; ``None`` under ``vmap``, where it is many values.

    Wraps ``torch._C._functorch``.
    """
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return None if functorch.is_batchedtensor(tensor) else tensor


def is_watched() -> bool:
    """Whether ``torch.func`` (``vmap``, ``grad``, ...) or a mode for functions or for dispatch sees every operation.

    Wraps ``_are_functorch_transforms_active``, ``_len_torch_function_stack``, ``_len_torch_dispatch_stack``.
    """
    c: Any = torch._C
    return bool(c._are_functorch_transforms_active() or c._len_torch_function_stack() or c._len_torch_dispatch_stack())


def multiplied(tensors: list[Tensor], factors: list[Tensor]) -> Sequence[Tensor]:
    """``tensors[i] * factors[i]`` for all i in one call, differentiable. Wraps ``torch._foreach_mul``."""
    return torch._foreach_mul(tensors, factors)


def version_of(tensor: Tensor) -> int:
    """How often ``tensor`` was written in place; -1 for an inference tensor, which does not count.

    Wraps ``Tensor._version``.
    """
    return -1 if tensor.is_inference() else tensor._version


def in_backward() -> bool:
    """Whether a backward pass is running: a forward pass that is made in it is recomputed from a checkpoint.

    Wraps ``torch._C._current_graph_task_id``.
    """
    return bool(torch._C._current_graph_task_id() != -1)


# -- modules -----------------------------------------------------------------------------------------------------


def is_batch_norm(kind: type) -> bool:
    """Whether ``kind`` is a batch norm, the synchronised one too. Wraps ``nn.modules.batchnorm._BatchNorm``."""
    return issubclass(kind, nn.modules.batchnorm._BatchNorm)


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of ``module`` itself by name, as it holds them: writing here replaces them.

    Wraps ``Module._parameters``.
    """
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of ``module`` itself by name, as it holds them. Wraps ``Module._buffers``."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The submodules of ``module`` by name, as it holds them. Wraps ``Module._modules``."""
    return module._modules


def forward_hooks(module: nn.Module) -> MutableMapping[int, Callable[..., Any]]:
    """The forward hooks of ``module`` in the order they are called in. Wraps ``Module._forward_hooks``."""
    return module._forward_hooks


def forward_pre_hooks(module: nn.Module) -> MutableMapping[int, Callable[..., Any]]:
    """The hooks called before ``module.forward``. Wraps ``Module._forward_pre_hooks``."""
    return module._forward_pre_hooks


def backward_hooks(module: nn.Module) -> MutableMapping[int, Callable[..., Any]]:
    """The full and the old backward hooks of ``module``. Wraps ``Module._backward_hooks``."""
    return module._backward_hooks


def backward_pre_hooks(module: nn.Module) -> MutableMapping[int, Callable[..., Any]]:
    """The hooks called before the backward pass of ``module``. Wraps ``Module._backward_pre_hooks``."""
    return module._backward_pre_hooks


def pruned_name(hook: Any) -> str:
    """The parameter that a hook of ``torch.nn.utils.prune`` masks. Wraps ``BasePruningMethod._tensor_name``."""
    return str(hook._tensor_name)


def state_dict_hooks(module: nn.Module) -> MutableMapping[int, Callable[..., Any]]:
    """The hooks called after ``module.state_dict()``. Wraps ``Module._state_dict_hooks``."""
    return module._state_dict_hooks


def takes_hooks(module: nn.Module) -> bool:
    """Whether hooks can be registered on ``module``: not while it is still being unpickled. Asks ``__dict__``."""
    return "_forward_hooks" in module.__dict__


def is_called_plainly(module: nn.Module) -> bool:
    """Whether ``module(x)`` is the ``forward`` of its class: no hook, own or global, not compiled, not overridden.

    Wraps ``Module._compiled_call_impl`` and the dictionaries of hooks that ``Module.__call__`` looks at.
    """
    return not (
        module._compiled_call_impl is not None
        or "forward" in module.__dict__
        or "_conv_forward" in module.__dict__
        or "_call_impl" in module.__dict__
        or "_wrapped_call_impl" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def convolve(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of ``layer`` (stride, padding mode, groups) with another weight and bias.

    Wraps ``_ConvNd._conv_forward``.
    """
    return cast(Tensor, cast(Any, layer)._conv_forward(x, weight, bias))


# -- the compiler ------------------------------------------------------------------------------------------------


def may_compile() -> bool:
    """Whether anything can be compiled in this process: the compiler, which takes seconds to import, is there.

    Wraps the module ``torch._dynamo``, which it does not import.
    """
    return "torch._dynamo" in sys.modules


def compiles_now() -> bool:
    """Whether functions that are called now may be handed to the compiler: a compiled one is running.

    Wraps ``torch._C._dynamo.eval_frame.get_eval_frame_callback``; a torch that lacks it says yes.
    """
    return torch.compiler.is_compiling() or _running_compiler() is not None  # the compiler traces only the first


_running_compiler: Callable[[], Any] = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: False)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called. Wraps ``Module._compiled_call_impl``."""
    return module._compiled_call_impl is not None


def compiled_modules() -> list[type]:
    """What ``torch.compile(module)`` makes; none where nothing was compiled.

    Wraps ``torch._dynamo.eval_frame.OptimizedModule``, which it does not import.
    """
    found = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    return [] if found is None else [found]


def never_compiled(function: F) -> F:
    """``function``, marked so that what is compiled does not trace into it; it may still be compiled by itself.

    Wraps the attribute ``_torchdynamo_disable``; :func:`.no_compile.eagerly` keeps the compiler out altogether.
    """
    cast(Any, function)._torchdynamo_disable = True
    return function


# -- optimizers --------------------------------------------------------------------------------------------------


def init_optimizer_hooks(optimizer: Optimizer) -> None:
    """Give an optimizer that does not call ``Optimizer.__init__`` the dictionaries its hooks are registered in.

    Wraps ``Optimizer._optimizer_*_hooks``.
    """
    for name in ("step", "state_dict", "load_state_dict"):
        for when in ("pre", "post"):
            optimizer.__dict__.setdefault(f"_optimizer_{name}_{when}_hooks", OrderedDict())


def optimizer_hooks(optimizer: Optimizer, name: str) -> MutableMapping[int, Callable[..., Any]]:
    """The hooks of ``optimizer`` itself: ``name`` is ``"step_pre"``, ``"state_dict_post"`` and so on.

    Wraps ``Optimizer._optimizer_*_hooks``.
    """
    return cast("MutableMapping[int, Callable[..., Any]]", getattr(optimizer, f"_optimizer_{name}_hooks"))


def patch_step(optimizer: Optimizer) -> None:
    """Let hooks run around ``optimizer.step``, as ``Optimizer.__init__`` does. Wraps ``_patch_step_function``."""
    cast(Any, optimizer)._patch_step_function()


def mark_hooked(step: F) -> F:
    """``step``, marked as one that runs hooks itself, so that torch does not run them around it once more.

    Wraps the attribute ``hooked`` that ``Optimizer._patch_step_function`` asks for.
    """
    cast(Any, step).hooked = True
    return step


def steps_under_amp(optimizer: Optimizer) -> bool:
    """Whether ``optimizer`` unscales gradients in its own step, as fused ones do.

    Wraps ``Optimizer._step_supports_amp_scaling``.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


# -- state dicts and compiled submodules -------------------------------------------------------------------------

COMPILED = "_orig_mod"  # the name under which torch.compile(module) holds the module


def module_versions(state: Any) -> dict[str, Any]:
    """The versions of the modules that a state dict was made by, by name. Wraps the attribute ``_metadata`` of it."""
    return cast("dict[str, Any]", getattr(state, "_metadata", {}))


# -- Lightning (2.6): attributes of a Trainer that it is given; nothing is imported --------------------------------


def fetcher_of(trainer: Any) -> Any:
    """The iterator that hands the batches of a training to its loop. Wraps ``_FitLoop._data_fetcher``."""
    return trainer.fit_loop._data_fetcher


def training_loader(trainer: Any) -> Any:
    """The ``CombinedLoader`` of a training. Wraps ``_FitLoop._combined_loader``."""
    return trainer.fit_loop._combined_loader


def load_loader_states(trainer: Any) -> bool:
    """Give the training loaders their states in the checkpoint; whether Lightning had not done so before.

    Wraps ``_FitLoop._combined_loader_states_to_load`` and ``_FitLoop._load_combined_loader_states``.
    """
    waiting = bool(trainer.fit_loop._combined_loader_states_to_load)
    trainer.fit_loop._load_combined_loader_states()
    return waiting


def forget_resuming(trainer: Any) -> None:
    """Let the loaders be asked for batches after the first hooks of the epoch, as in one that was not resumed.

    Wraps ``_FitLoop._resuming_from_checkpoint``.
    """
    trainer.fit_loop._resuming_from_checkpoint = False


def end_epoch_without_validation(trainer: Any) -> None:
    """Let an epoch that has no batch left be over, unless it ends with a validation.

    Wraps ``_TrainingEpochLoop._should_check_val_fx`` and ``_batches_that_stepped``, and ``_EvaluationLoop._has_run``.
    """
    loop = trainer.fit_loop.epoch_loop
    if not loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
        loop.val_loop._has_run = True
        loop._batches_that_stepped += 1


def logged_values(trainer: Any) -> Any:
    """What ``self.log`` has gathered in a training epoch, a mapping. Wraps ``_TrainingEpochLoop._results``."""
    return trainer.fit_loop.epoch_loop._results
