"""What newborn units are drawn from: the layer's own initialiser, or the moments that its weights began with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_meanfield.particles import Neurons
from torch_meanfield.particles.copying import whole
from torch_meanfield.particles.population import homes


@dataclass(frozen=True)
class Initialiser:
    """How one column is drawn: ``mean + spread * noise``, the noise uniform on [-1, 1] or standard normal.

    Attributes:
        mean: location.
        spread: half the width of the uniform distribution, or the standard deviation of the normal one.
        uniform: which of the two.
    """

    mean: float
    spread: float
    uniform: bool

    def draw(self, shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
        """Independent draws of ``shape``, in the dtype and on the device of ``like``."""
        # Half precision has no generator of its own everywhere; float32 draws are the same numbers on every dtype.
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        out = torch.empty(tuple(shape), dtype=wide, device=like.device)
        if self.spread == 0:
            return out.fill_(self.mean).to(like.dtype)
        if self.uniform:
            out.uniform_(self.mean - self.spread, self.mean + self.spread, generator=generator)
        else:
            out.normal_(self.mean, self.spread, generator=generator)
        return out.to(like.dtype)


@torch.no_grad()
def initialisers_of(population: Neurons, model: nn.Module | None) -> dict[int, Initialiser]:
    """The initialiser of every incoming and own column, by its number among the columns.

    A ``Linear`` or convolution whose weights still have the scale that ``reset_parameters`` gives them (as in a model
    that was not loaded) keeps that one, U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weight and bias. Every other tensor,
    a declared one without a module among them, is drawn from the normal law with the mean and deviation it has now,
    which is its constant where it is constant (gains, fresh running statistics).

    Reads the values once; to be called when an optimizer is wrapped, not while it steps.
    """
    modules = {} if model is None else homes(model)
    found = {}
    for i, (column, role) in enumerate(zip(population.slices(population.columns), population.roles, strict=True)):
        if role == "out":
            continue
        module = modules.get(id(column.tensor)) if isinstance(column.tensor, nn.Parameter) else None
        bound = _reset_bound(module) if role == "in" and module is not None else None
        value = whole(column.tensor).double()
        mean, std = value.mean().item(), value.std(correction=0).item() if value.numel() > 1 else 0.0
        found[i] = Initialiser(mean, std, False) if bound is None else Initialiser(0.0, bound, True)
    return found


def _reset_bound(module: nn.Module) -> float | None:
    """``1/sqrt(fan_in)`` if ``module`` draws from U(+-that) and its weights look like it, else ``None``."""
    reset = getattr(type(module), "reset_parameters", None)
    if reset not in (nn.Linear.reset_parameters, nn.Conv2d.reset_parameters):
        return None
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.is_meta or getattr(module, "transposed", False):
        return None
    bound = 1 / math.sqrt(weight.shape[1:].numel())
    std = whole(weight).double().square().mean().sqrt().item()
    # a second moment, not a deviation: units pushed to one side (dead ones, say) do not change it
    return bound if abs(std * math.sqrt(3) / bound - 1) < 0.1 else None
