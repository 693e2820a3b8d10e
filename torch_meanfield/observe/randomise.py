"""Random parameters and statistics, so that no two units of a model are alike and none is silent."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# Drawing hundreds of millions of normal numbers takes seconds; a prime number of them is drawn once and repeated.
# Rows of one tensor would be equal only if the prime divided the distance between them.
_DRAWN = 1_000_003


class Draws:
    """A stream of random numbers on the CPU, so that they are the same for every device.

    Args:
        seed: Seed of the generator.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.normal = torch.randn(_DRAWN, generator=self.generator, dtype=torch.float32, device="cpu")
        self.uniform = torch.rand(_DRAWN, generator=self.generator, dtype=torch.float32, device="cpu") + 0.5

    def take(self, shape: torch.Size, *, normal: bool) -> Tensor:
        """Standard normal numbers, or uniform ones in 0.5 to 1.5."""
        n = math.prod(shape)
        numbers = self.normal if normal else self.uniform
        offset = self._offset()
        if offset + n <= _DRAWN:
            return numbers[offset : offset + n].reshape(shape)
        return _tile_(torch.empty(n, dtype=numbers.dtype, device="cpu"), numbers, offset).reshape(shape)

    def fill_(self, tensor: Tensor, factor: float) -> None:
        """Standard normal numbers times ``factor``, the same that :meth:`take` gives.

        A large matrix is written once, piece by piece, without another one of its size in between.
        """
        if tensor.device.type == "cpu" and tensor.numel() > _DRAWN and tensor.is_contiguous():
            _tile_(tensor.view(-1), self.normal.to(tensor.dtype) * factor, self._offset())
        else:
            tensor.copy_(self.take(tensor.shape, normal=True)).mul_(factor)

    def _offset(self) -> int:
        return int(torch.randint(_DRAWN, (), generator=self.generator, device="cpu"))


def _tile_(out: Tensor, numbers: Tensor, offset: int) -> Tensor:
    out[: len(numbers) - offset] = numbers[offset:]
    for start in range(len(numbers) - offset, len(out), len(numbers)):
        part = out[start : start + len(numbers)]
        part.copy_(numbers[: len(part)])
    return out


@torch.no_grad()
def randomise_(model: nn.Module, draws: Draws, scale: float = 1.0) -> None:
    """Give every parameter and every normalisation statistic of ``model`` random values, in place.

    Running variances are uniform in 0.5 to 1.5 and running means normal; parameters as in :func:`draw_`. Other buffers
    are constants of the architecture and stay.

    Args:
        scale: Factor on the standard deviation of matrices and kernels.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            draw_(parameter, draws, scale, centred=name.endswith("bias"))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(draws.take(buffer.shape, normal=True) * 0.5)
        elif name.endswith("running_var"):
            buffer.copy_(draws.take(buffer.shape, normal=False))


@torch.no_grad()
def draw_(tensor: Tensor, draws: Draws, scale: float = 1.0, *, centred: bool = False) -> None:
    """Random values for one tensor.

    Matrices and kernels are normal with variance ``scale**2`` over fan-in, vectors (gains, layer scales) uniform in
    0.5 to 1.5, or ``centred`` (biases: all of one sign, they would make every token alike) normal around 0.
    """
    if tensor.ndim >= 2:
        fan_in = max(tensor.numel() // max(tensor.shape[0], 1), 1)
        draws.fill_(tensor, scale / math.sqrt(fan_in))
    elif centred:
        tensor.copy_(draws.take(tensor.shape, normal=True)).mul_(0.5)
    else:
        tensor.copy_(draws.take(tensor.shape, normal=False))


@torch.no_grad()
def nudge_(model: nn.Module, draws: Draws, relative: float) -> None:
    """Multiply every parameter by ``1 + relative * normal``, one number for each entry of its first dimension."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            rows = parameter.shape[:1] + (1,) * (parameter.ndim - 1)
            parameter.mul_(1 + relative * draws.take(torch.Size(rows), normal=True).to(parameter))
