"""Checkpoints that name the tensors of a compiled submodule as those of the submodule itself."""

from __future__ import annotations

from typing import Any

from torch import nn

WRAPPED = "_orig_mod"  # what torch.compile(module) calls the module within


def name_plainly_(module: nn.Module) -> None:
    """Leave ``_orig_mod.`` out of the names in ``module.state_dict()``, and let it load states with and without.

    Args:
        module: within it, submodules that were replaced by ``torch.compile(submodule)``; those found in an earlier call
            are left as they are.
    """
    each: Any  # torch declares no types for these two
    for each in module.modules():
        if WRAPPED in each._modules and _take_out not in each._state_dict_hooks.values():
            each.register_state_dict_post_hook(_take_out)
            each.register_load_state_dict_pre_hook(_put_in)


def _take_out(module: nn.Module, state: Any, prefix: str, local_metadata: Any) -> None:
    within = f"{prefix}{WRAPPED}."
    for name in [name for name in state if name.startswith(within)]:
        state[prefix + name[len(within) :]] = state.pop(name)
    # Of each module's version, both names: the compiled model looks for one, the plain model for the other.
    versions = getattr(state, "_metadata", {})
    for name in [name for name in versions if f"{name}.".startswith(within)]:
        versions[(prefix + name[len(within) :]).removesuffix(".")] = versions[name]


def _put_in(module: nn.Module, state: Any, prefix: str, *_: Any) -> None:
    within = f"{prefix}{WRAPPED}."
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(within)]:
        state[within + name[len(prefix) :]] = state.pop(name)
