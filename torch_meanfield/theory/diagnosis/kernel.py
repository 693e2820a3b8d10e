"""The tangent kernel of a diagnosis: of the outputs along one random direction, so that many classes cost nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_meanfield.observe import tensors_in
from torch_meanfield.theory.diagnosis.parts import Kernel
from torch_meanfield.theory.ntk import empirical_ntk


class _Projected(nn.Module):
    """``model``, its outputs along one direction; ``(B, 1)``."""

    direction: Tensor

    def __init__(self, model: nn.Module, direction: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("direction", direction[:, None])

    def forward(self, x: Tensor) -> Tensor:
        out = next(t for t in tensors_in(self.model(x)) if t.is_floating_point()).flatten(1)
        return out @ self.direction


def kernel_of(model: nn.Module, x: Tensor, output: Tensor, max_bytes: int) -> Kernel:
    """Its eigenvalues; or, where the model has none or memory is short, the reason.

    Args:
        model: In any mode.
        x: The inputs.
        output: What the model gave, ``(B, ...)``: its size, dtype and device are those of the direction.
        max_bytes: See :func:`.empirical_ntk`.
    """
    direction = torch.randn(output[0].numel(), generator=torch.Generator().manual_seed(0), device="cpu").to(output)
    empty = torch.empty(0, dtype=torch.float64, device="cpu")
    try:
        kernel: Any = empirical_ntk(
            _Projected(model, direction / direction.norm()), x, reduce="trace", max_bytes=max_bytes
        )
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        return Kernel(len(x), empty, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    kernel = kernel.double().cpu()
    if not bool(kernel.isfinite().all()):
        return Kernel(len(x), empty, "it is not finite")
    return Kernel(len(x), torch.linalg.eigvalsh((kernel + kernel.T) / 2).clamp_min(0))
