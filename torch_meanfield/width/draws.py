"""The one source of randomness of birth and death, alike on all data-parallel ranks and on every device."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


class Draws:
    """Random numbers from a generator on the CPU.

    Args:
        generator: on the CPU, seeded alike on all ranks.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, *shape: int, like: Tensor) -> Tensor:
        """Uniform draws on [0, 1) in the dtype and on the device of ``like``; the same ones on every device."""
        generator = self.generator
        return torch.rand(shape, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)

    def on(self, device: torch.device) -> torch.Generator:
        """A generator on ``device``, seeded from this one: large draws are made where they are used."""
        seed = int(torch.randint(2**62, (1,), generator=self.generator, device=self.generator.device))
        return torch.Generator(device).manual_seed(seed)

    def __getstate__(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state()}

    def __setstate__(self, state: dict[str, Tensor]) -> None:
        self.generator = torch.Generator()
        self.generator.set_state(state["generator"])

    def fingerprint(self) -> int:
        """A number in which two generators in different states are all but sure to differ."""
        return zlib.crc32(bytes(self.generator.get_state().tolist()))
