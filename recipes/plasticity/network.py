"""The networks of the benchmarks: each shows its hidden units to the methods that look at them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


@dataclass
class Hidden:
    """One hidden layer, as the peers see it.

    Attributes:
        first: makes the units: linear, or a convolution of which a channel is a unit.
        last: reads them.
        norm: between, or ``None``.
        values: the units at the last forward pass, ``(B, n)``; of a convolution ``(B * places, n)``.
    """

    first: nn.Linear | nn.Conv2d
    last: nn.Linear | nn.Conv2d
    norm: nn.LayerNorm | None
    values: Tensor


class Network(nn.Module, ABC):
    """A network whose hidden units can be looked at.

    Attributes:
        widths: units in each of its hidden layers.
        values: the units of each at the last forward pass, ``(B, n)``.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = list(widths)
        self.values: list[Tensor] = []

    @abstractmethod
    def hidden(self) -> list[Hidden]:
        """Its hidden layers with what they held in the last forward pass."""


class Mlp(Network):
    """Hidden layers of ``widths`` units.

    Args:
        inputs: numbers in an input.
        classes: numbers in an output.
        widths: units in each hidden layer.
        activation: a key of :data:`ACTIVATIONS`.
        norm: a layer norm before each activation.
    """

    def __init__(
        self,
        inputs: int,
        classes: int,
        widths: Sequence[int] = (64, 64),
        activation: str = "relu",
        norm: bool = False,
    ) -> None:
        super().__init__(widths)
        sizes = [inputs, *widths, classes]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.norms = nn.ModuleList(nn.LayerNorm(width) if norm else nn.Identity() for width in widths)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        self.values = []
        for layer, norm in zip(list(self.layers)[:-1], self.norms, strict=True):
            x = self.activation(norm(layer(x)))
            self.values.append(x.detach())
        return self.layers[-1](x)

    def hidden(self) -> list[Hidden]:
        """See :meth:`Network.hidden`."""
        layers, norms = list(self.layers), [n if isinstance(n, nn.LayerNorm) else None for n in self.norms]
        return [Hidden(layers[i], layers[i + 1], norms[i], self.values[i]) for i in range(len(norms))]


class ConvNet(Network):
    """Three convolutions of ``width`` channels on images of 14 x 14 given as rows; a channel is a unit.

    14 x 14 becomes 7 x 7, 4 x 4 and 1 x 1; what is left is read by a linear layer.
    """

    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__([width] * 3)
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(1, width, 3, stride=2, padding=1),
                nn.Conv2d(width, width, 3, stride=2, padding=1),
                nn.Conv2d(width, width, 4),
                nn.Linear(width, classes),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        self.values = []
        x = x.view(len(x), 1, 14, 14)
        for layer in list(self.layers)[:-1]:
            x = torch.relu(layer(x))
            self.values.append(x.detach().movedim(1, -1).flatten(0, -2))
        return self.layers[-1](x.flatten(1))

    def hidden(self) -> list[Hidden]:
        """See :meth:`Network.hidden`."""
        layers = list(self.layers)
        return [Hidden(layers[i], layers[i + 1], None, self.values[i]) for i in range(3)]


@torch.no_grad()
def silent_share(model: Network, x: Tensor) -> float:
    """Of the hidden units, the share that no row of ``x`` reaches (0 of a smooth activation)."""
    model(x)
    return float(torch.cat([(values == 0).all(0) for values in model.values]).float().mean())
