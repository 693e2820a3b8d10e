"""Checkpoints that name the tensors of a compiled submodule as those of the submodule itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from torch_meanfield._torch import COMPILED, children_of, module_versions, state_dict_hooks


def name_plainly_(module: nn.Module) -> None:
    """Leave ``_orig_mod.`` out of the names in ``module.state_dict()``, and let it load states with and without.

    Args:
        module: the model in which submodules may have been replaced by ``torch.compile(submodule)``; those found in
            an earlier call are left as they are.
    """
    each: Any  # torch declares no types for these two
    for each in module.modules():
        if COMPILED in children_of(each) and _take_out not in state_dict_hooks(each).values():
            each.register_state_dict_post_hook(_take_out)
            each.register_load_state_dict_pre_hook(_put_in)


def _take_out(module: nn.Module, state: Any, prefix: str, local_metadata: Any) -> None:
    within = f"{prefix}{COMPILED}."
    for name in [name for name in state if name.startswith(within)]:
        state[prefix + name[len(within) :]] = state.pop(name)
    # Of each module's version, both names: the compiled model looks for one, the plain model for the other.
    versions = module_versions(state)
    for name in [name for name in versions if f"{name}.".startswith(within)]:
        versions[(prefix + name[len(within) :]).removesuffix(".")] = versions[name]


def _put_in(module: nn.Module, state: Any, prefix: str, *_: Any) -> None:
    within = f"{prefix}{COMPILED}."
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(within)]:
        state[within + name[len(prefix) :]] = state.pop(name)
