"""Which element-wise function lies between two layers, recognised by what it did."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]

KNOWN: dict[str, Activation] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "squared_relu": lambda x: F.relu(x).square(),
    "identity": lambda x: x,
}


@torch.no_grad()
def recognise(before: Tensor, after: Tensor) -> Activation | None:
    """The known activation with ``after = activation(before)``, or ``None``.

    A module, a functional call and a method all compute the same numbers, so that comparing numbers finds each of
    them. Meant for a few rows; reads one flag from the device.

    Args:
        before, after: what went in and what came out, equal shapes.
    """
    if before.shape != after.shape:
        return None
    before, after = before.float(), after.float()
    size = after.abs().amax().clamp_min(1e-12)
    misses = torch.stack([(f(before) - after).abs().amax() / size for f in KNOWN.values()])
    # 1e-2: half precision between the two, and different kernels of one function
    best = int(misses.nan_to_num(torch.inf).argmin())
    return list(KNOWN.values())[best] if float(misses[best]) < 1e-2 else None
