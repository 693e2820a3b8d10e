"""The states of one process's random number generators, as tensors and plain types."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

DEEP = 3  # attributes of attributes of attributes of a loader: DataLoader -> BatchSampler -> RandomSampler -> generator


def collect(cuda: bool = True) -> dict[str, Any]:
    """The states of Python's, NumPy's (where it is imported), torch's, and all of CUDA's global generators.

    Args:
        cuda: whether to read CUDA's, if CUDA is in use.
    """
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {"python": [version, list(words), gauss], "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, words, *rest = numpy.random.get_state()
        if name == "MT19937":  # another kind is the user's own, and its state is not kept
            states["numpy"] = [torch.tensor(words.tolist(), device="cpu"), *map(float, rest)]
    if cuda and cast(Any, torch.cuda).is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_(states: dict[str, Any]) -> None:
    """Set the global generators to what :func:`collect` found."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(states["torch"].cpu())
    if "numpy" in states:
        import numpy

        words, position, has_gauss, cached = states["numpy"]
        numpy.random.set_state(("MT19937", words.cpu().numpy(), int(position), int(has_gauss), cached))
    for i, state in enumerate(states.get("cuda", [])):
        torch.cuda.set_rng_state(state.cpu(), i)


def seed_(number: int) -> None:
    """Seed the global generators of the CPU from ``number``, at least 0."""
    torch.default_generator.manual_seed(number)
    random.seed(number)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(number % 2**32)


def inside(thing: Any, name: str, depth: int = DEEP) -> Iterator[tuple[str, torch.Generator]]:
    """The generators that are attributes of ``thing``, or of its attributes in turn, each once, by dotted name."""
    yield from _inside(thing, name, depth, set())


def _inside(thing: Any, name: str, depth: int, seen: set[int]) -> Iterator[tuple[str, torch.Generator]]:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Generator):
        yield name, thing
    elif depth and not isinstance(thing, (Tensor, nn.Module, type)):
        for key, value in getattr(thing, "__dict__", {}).items():
            yield from _inside(value, f"{name}.{key}", depth - 1, seen)
