"""Loading a checkpoint whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torch_meanfield._torch import buffers_of, parameters_of


def load_whole_(module: nn.Module, state_dict: Mapping[str, Any], *, strict: bool = True, assign: bool = False) -> Any:
    """``module.load_state_dict(...)`` that leaves ``module`` as it was, bit for bit, if it raises.

    torch's own copies every entry that fits and raises afterwards, so that a checkpoint of another model leaves a
    mixture of the two. The mean-field layers and models load in this way by themselves; for a converted model, or one
    of your own that holds such layers, call this. Takes a second copy of the tensors while it runs.

    Args:
        module: any module.
        state_dict: tensors by qualified name.
        strict, assign: as in :meth:`torch.nn.Module.load_state_dict`.

    Returns:
        the missing and the unexpected keys.

    Raises:
        TypeError: ``state_dict`` is no mapping, or one of its keys is no string.
        RuntimeError: missing, unexpected, misshapen entries, or such that are no tensors; they are named.
        ValueError: what a layer inside refuses, as a tau that is not finite.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> before = layer.weight.clone()
        >>> try:
        ...     load_whole_(layer, {"weight": torch.zeros(2, 2), "head": torch.zeros(3)})
        ... except RuntimeError:
        ...     print(torch.equal(layer.weight, before))
        True
    """
    return loaded_whole(module, state_dict, lambda: module.load_state_dict(state_dict, strict=strict, assign=assign))


def loaded_whole(module: nn.Module, state_dict: Mapping[str, Any], load: Callable[[], Any]) -> Any:
    """What ``load()`` returns; if it raises, ``module`` is as it was. See :func:`load_whole_`."""
    check_entries(module, state_dict)
    with unchanged_if_raised(module):
        return load()


def check_entries(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Raise for what torch stumbles over without a name, or takes silently.

    Raises:
        TypeError: ``state_dict`` is no mapping, or one of its keys is no string.
        RuntimeError: complex numbers for a real tensor (torch would drop their imaginary parts), a sparse
            tensor for a dense one, one without values.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    for key in state_dict:
        if not isinstance(key, str):
            raise TypeError(f"state_dict has the key {key!r} ({type(key).__name__}); names of tensors are strings")
    for key, ours in (*module.named_parameters(), *module.named_buffers()):
        theirs = state_dict.get(key)
        if not isinstance(theirs, Tensor):
            continue  # torch names what is none
        if theirs.is_complex() and not ours.is_complex():
            raise RuntimeError(
                f"state_dict[{key!r}] is {theirs.dtype}, but the model's tensor is {ours.dtype}; pass its "
                f"real part, or make the model complex"
            )
        if theirs.is_meta and not ours.is_meta:
            raise RuntimeError(
                f"state_dict[{key!r}] is on the meta device: it has a shape, but no values; save a model that holds "
                f"its weights"
            )
        if theirs.layout != ours.layout:
            raise RuntimeError(
                f"state_dict[{key!r}] is {theirs.layout}, but the model's tensor is {ours.layout}; pass it as the "
                f"model has it (to_dense(), say)"
            )


@contextmanager
def unchanged_if_raised(module: nn.Module) -> Iterator[None]:
    """If the body raises, put back every tensor and attribute of ``module`` and of all modules inside."""
    attributes = [(m, dict(vars(m)), dict(parameters_of(m)), dict(buffers_of(m))) for m in module.modules()]
    tensors: dict[int, Tensor] = {}
    for _, _, parameters, buffers in attributes:
        tensors.update((id(t), t) for t in (*parameters.values(), *buffers.values()) if t is not None)
    values = [(t, t.detach().clone()) for t in tensors.values()]
    try:
        yield
    except BaseException:
        for m, attrs, parameters, buffers in attributes:
            m.__dict__.clear()
            m.__dict__.update(attrs)
            parameters_of(m).clear()
            parameters_of(m).update(parameters)
            buffers_of(m).clear()
            buffers_of(m).update(buffers)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        raise
