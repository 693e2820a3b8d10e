"""Double precision throughout: a model that casts to single precision inside is kept from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LOWER = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


class InDouble(TorchFunctionMode):
    """Inside the context, what asks for a lower floating-point precision by name gets double.

    Some norms compute in ``x.float()`` whatever they are given, and their rounding errors of 1e-8 would drown what is
    measured to 1e-10. Functions without a named precision run as they are.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _CASTS:
            return Tensor.double(*args, **(kwargs or {}))
        return func(*map(_raised, args), **{k: _raised(v) for k, v in (kwargs or {}).items()})


def _raised(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _LOWER else value
