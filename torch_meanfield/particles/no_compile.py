"""Functions that the compiler must not reach, though a compiled ``optimizer.step`` calls them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from torch_meanfield._torch import compiles_now, never_compiled

F = TypeVar("F", bound=Callable[..., Any])


def eagerly(function: F) -> F:
    """``function``, never compiled: neither itself nor what it calls.

    What moves and replaces particles reads the device, depends on counts that change from call to call, and writes
    into views: compiled piece by piece (``torch.compile(optimizer.step)``) it lost some of its writes in torch 2.15.
    """
    disabled: Any = None

    @never_compiled
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if not compiles_now():
            return function(*args, **kwargs)
        if disabled is None:
            disabled = cast(Any, torch.compiler).disable(function)
        return disabled(*args, **kwargs)

    return cast(F, call)
