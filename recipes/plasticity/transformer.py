"""A small vision transformer, as a network of the benchmarks: the hidden units of its MLPs are shown."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.plasticity.network import ACTIVATIONS, Hidden, Network

PATCH = 2  # pixels on a side


class Block(nn.Module):
    """Attention and an MLP, each after a layer norm and added to what was (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int, heads: int, units: int, activation: str) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.first, self.last = nn.Linear(width, units), nn.Linear(units, width)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens ``(B, T, width)``, themselves and the MLP's hidden units ``(B, T, units)``."""
        b, t, width = x.shape
        q, k, v = self.query_key_value(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.join(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, width))
        units = self.activation(self.first(self.norm2(x)))
        return x + self.last(units), units


class VisionTransformer(Network):
    """Two blocks of ``width`` numbers a token and ``units`` hidden units, on square images given as rows.

    Args:
        inputs: pixels of an image.
        classes: numbers in an output.
        activation: of the MLPs, a key of :data:`.ACTIVATIONS`.
        width: numbers in a token.
        units: hidden units of each MLP.
    """

    def __init__(self, inputs: int, classes: int, activation: str, width: int = 32, units: int = 64) -> None:
        super().__init__([units] * 2)
        self.side = round(inputs**0.5)
        self.embed = nn.Conv2d(1, width, PATCH, stride=PATCH)
        self.places = nn.Parameter(0.02 * torch.randn((self.side // PATCH) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, 2, units, activation) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        self.values = []
        x = self.embed(x.view(len(x), 1, self.side, self.side)).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            x, units = block(x)
            self.values.append(units.detach().flatten(0, 1))
        return self.head(self.norm(x).mean(1))

    def hidden(self) -> list[Hidden]:
        """See :meth:`.Network.hidden`."""
        pairs = [(block.first, block.last) for block in self.blocks]
        return [Hidden(a, b, None, v) for (a, b), v in zip(pairs, self.values, strict=True)]  # type: ignore[arg-type]
