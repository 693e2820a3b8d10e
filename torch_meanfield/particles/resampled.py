"""What a module offers whose particles may die and be cloned, so that the two wings need not know each other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_meanfield.particles.population import Population


@runtime_checkable
class Resampled(Protocol):
    """A module that is a population and knows itself what a death and a birth in it mean.

    ``BirthDeathOptimizer`` decides who dies and who is cloned, from :meth:`potential`; the module carries it out.
    """

    def population(self) -> Population:
        """The particles, in the order of their places."""
        ...

    def potential(self) -> Tensor | None:
        """Of every particle, shape ``(n,)``, from gradients that exist; ``None`` where there are none."""
        ...

    def position(self) -> Tensor | None:
        """The parameter whose gradient the potential is read from; ``None`` if the module does not learn it."""
        ...

    def check_untied(self, model: nn.Module) -> None:
        """Raise ``ValueError`` if another module of ``model`` uses a tensor of one of the particles."""
        ...

    def resample_(self, index: Tensor, optimizers: Iterable[Optimizer] = (), cause: str = "birth_death") -> Tensor:
        """Let place i take over what place ``index[i]`` holds; returns the index as it was carried out."""
        ...
