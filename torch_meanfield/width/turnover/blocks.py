"""Residual blocks as one of an optimizer's populations: a module that resamples its own particles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_meanfield.particles.population import Column, Stack
from torch_meanfield.particles.resampled import Resampled


class Blocks:
    """The particles of a :class:`~torch_meanfield.particles.resampled.Resampled` module, a mean-field layer.

    Who dies and who is cloned is decided as for neurons; what that means, the module knows: the blocks' time
    intervals are re-divided, so a birth here is always a clone.

    Args:
        module: the layer.
        name: shown in errors, reports and logs.

    Raises:
        TypeError: ``module`` does not resample itself.
        ValueError: it has fewer than two particles, or its times are not learned, so that it has no potential.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        if not isinstance(module, nn.Module) or not isinstance(module, Resampled):
            raise TypeError(
                f"{name}: {type(module).__name__} is no layer whose blocks can die and be cloned; that is a "
                f"MeanFieldSequential or a converted stage, and neurons are declared as a list of (tensor, dim)"
            )
        self.module, self.name = module, name
        self.size: int = module.population().size
        if self.size < 2:
            raise ValueError(f"{name}: a population of {self.size} block has nothing to exchange; leave it out")
        if module.position() is None:
            raise ValueError(
                f"{name}: its times are fixed, and the potential of a block is read from their gradient; make the "
                f"layer with learn_tau=True, or leave it out"
            )

    @property
    def layer(self) -> Resampled:
        """The module, as what it offers."""
        assert isinstance(self.module, Resampled)
        return self.module

    @property
    def owner(self) -> nn.Module:
        """The module whose function an exchange leaves unchanged."""
        return self.module

    @property
    def columns(self) -> Sequence[Column]:
        """What the blocks own now."""
        return self.layer.population().columns

    @property
    def parameter(self) -> Tensor:
        """The positions: the parameter whose gradient the potential is read from."""
        position = self.layer.position()
        assert position is not None
        return position

    def parameters(self) -> list[Tensor]:
        """Every parameter of a block, and the positions."""
        stacked = [t for c in self.columns if isinstance(c, Stack) for t in c.tensors if isinstance(t, nn.Parameter)]
        return [*stacked, self.parameter]

    def potential(self) -> Tensor | None:
        """Of every block, shape ``(n,)``."""
        return self.layer.potential()

    def read_into(self, out: Tensor) -> bool:
        """Write the present potentials to ``out``, ``(n,)``; ``False`` if there are none."""
        value = self.potential()
        if value is not None:
            out.copy_(value)
        return value is not None

    def resample_(self, index: Tensor, optimizers: Iterable[Optimizer]) -> Tensor:
        """Carry ``index`` out; returns the index as it was carried out (in the order of the times)."""
        return self.layer.resample_(index, optimizers, cause="birth_death")

    def __repr__(self) -> str:
        return f"Blocks({self.name}, {self.size})"


def blocks_of(model: nn.Module) -> list[Blocks]:
    """Every layer of ``model`` whose blocks can die and be cloned: two at least, with times that are learned."""
    found = []
    for name, module in model.named_modules():
        position = module.position() if isinstance(module, Resampled) else None
        if position is None or position.is_meta or position.numel() < 2:
            continue
        found.append(Blocks(module, f"{name or type(module).__name__} (blocks)"))
    return found
