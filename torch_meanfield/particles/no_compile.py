"""Functions that the compiler must not reach, though a compiled ``optimizer.step`` calls them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def eagerly(function: F) -> F:
    """``function``, never compiled: neither itself nor what it calls.

    What moves and replaces particles reads the device, depends on counts that change from call to call, and writes
    into views: compiled piece by piece (``torch.compile(optimizer.step)``) it lost some of its writes in torch 2.15.
    """
    disabled: Any = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:  # nothing can be compiled, and importing it takes seconds
            return function(*args, **kwargs)
        if disabled is None:
            disabled = cast(Any, torch.compiler).disable(function)
        return disabled(*args, **kwargs)

    cast(Any, call)._torchdynamo_disable = True  # not to be traced into
    return cast(F, call)
