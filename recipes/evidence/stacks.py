"""Deep residual stacks of small branches, in every form that the comparisons have: plain, scaled, with times."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_meanfield import MeanFieldSequential


def relu_branch(width: int) -> nn.Module:
    """A linear layer and ReLU, the block of Bachlechner et al. (2021), section 4, drawn as He et al. (2015) do."""
    linear = nn.Linear(width, width)
    nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, nn.ReLU())


def pre_norm_branch(width: int) -> nn.Module:
    """Layer norm, two linear layers with GELU in between: the MLP of a transformer's block."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


class Chain(nn.Module):
    """Branches one behind the other, each with or without the stream, a factor, and a norm behind it.

    Args:
        branches: modules that keep the shape.
        residual: whether the stream is added.
        factor: what a learned factor of each branch begins with; ``None`` for no factor.
        norm: the number of features that a layer norm behind each sum has; ``None`` for no norm.
    """

    def __init__(
        self, *branches: nn.Module, residual: bool = True, factor: float | None = None, norm: int | None = None
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.norms = nn.ModuleList(nn.Identity() if norm is None else nn.LayerNorm(norm) for _ in branches)
        n = len(branches)
        self.factors = None if factor is None else nn.Parameter(torch.full((n,), factor))
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """The stream behind the last branch."""
        for i, (branch, norm) in enumerate(zip(self.branches, self.norms, strict=True)):
            out = branch(x)
            if self.factors is not None:
                out = self.factors[i] * out
            x = norm(x + out if self.residual else out)
        return x

    def steps(self) -> Tensor:
        """What each branch is multiplied by, shape ``(n,)``."""
        return torch.ones(len(self.branches)) if self.factors is None else self.factors.detach()


Form = Callable[[list[nn.Module], int], Any]

# From the branches and their width, a stack of each form.
FORMS: dict[str, Form] = {
    "no stream": lambda b, w: Chain(*b, residual=False),
    "residual": lambda b, w: Chain(*b),
    "layer norm": lambda b, w: Chain(*b, norm=w),
    "learned factors from 0 (ReZero)": lambda b, w: Chain(*b, factor=0.0),
    "learned factors from 1/sqrt n": lambda b, w: Chain(*b, factor=1 / math.sqrt(len(b))),
    "steps fixed at 1/n": lambda b, w: MeanFieldSequential(*b, horizon=1.0, learn_tau=False),
    "steps fixed at 1/sqrt n": lambda b, w: MeanFieldSequential(*b, horizon=math.sqrt(len(b)), learn_tau=False),
    "horizon 1, learned": lambda b, w: MeanFieldSequential(*b, horizon=1.0),
    "horizon sqrt n, learned": lambda b, w: MeanFieldSequential(*b, horizon=math.sqrt(len(b))),
}


class Classifier(nn.Module):
    """A linear layer, a stack, a linear layer.

    Args:
        stack: keeps ``(..., width)``.
        inputs: numbers in an input, however they are arranged.
        width: of the stack.
        classes: to tell apart.
    """

    def __init__(self, stack: nn.Module, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.first, self.stack, self.last = nn.Linear(inputs, width), stack, nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape ``(N, classes)``."""
        out: Tensor = self.last(self.stack(self.first(x.flatten(1))))
        return out
