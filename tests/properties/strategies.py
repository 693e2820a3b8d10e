"""Random tensors, populations and index maps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from torch_meanfield import Population, Slice, Stack

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.int8,
    torch.bool,
)
LAYOUTS = ("contiguous", "transposed", "channels_last", "part of a larger one", "backwards in memory")
SEEDS = st.integers(0, 2**31)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any values of the dtype, infinities and not-a-numbers among them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values at other places of memory."""
    if layout == "transposed" and tensor.ndim > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels_last" and tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "part of a larger one":
        larger = torch.zeros(*(s + 2 for s in tensor.shape), dtype=tensor.dtype)
        part = larger[tuple(slice(1, s + 1) for s in tensor.shape)]
        part.copy_(tensor)
        return part
    if layout == "backwards in memory":
        order = list(range(tensor.ndim))[::-1]
        return tensor.permute(order).contiguous().permute(order)
    return tensor.clone()


def bits(tensor: Tensor) -> bytes:
    """What is in memory, entry by entry."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@dataclass
class Drawn:
    """A population, and where each of its tensors came from."""

    population: Population
    tensors: list[Tensor]


@st.composite
def populations(draw: st.DrawFn) -> Drawn:
    """One to four columns of any dtype and layout: slices along any dimension, packed or not, and stacks."""
    n = draw(st.integers(1, 6))
    columns: list[Slice | Stack] = []
    tensors: list[Tensor] = []
    for _ in range(draw(st.integers(1, 4))):
        dtype, layout, seed = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS)), draw(SEEDS)
        shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
        if draw(st.booleans()):
            dim = draw(st.integers(0, len(shape) - 1))
            outer, inner = draw(st.integers(1, 3)), draw(st.integers(1, 3))
            shape[dim] = outer * n * inner
            tensor = laid_out(random_bits(tuple(shape), dtype, seed), layout)
            columns.append(Slice(tensor, dim - draw(st.sampled_from((0, len(shape)))), outer, inner))
            tensors.append(tensor)
        else:
            stack = [laid_out(random_bits(tuple(shape), dtype, seed + i), layout) for i in range(n)]
            columns.append(Stack(stack))
            tensors += stack
    return Drawn(Population(columns), tensors)


@st.composite
def index_maps(draw: st.DrawFn, n: int) -> list[int]:
    """Any map of n places to n sources."""
    return draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n))
