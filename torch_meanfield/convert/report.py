"""What a conversion did, block by block, as plain data that prints readably."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from torch_meanfield.convert.stage import ConvertedStage

RECORD = "_mean_field_conversion"  # the key of the record in the model's ``__dict__``


@dataclass(frozen=True)
class FixedBlock:
    """A residual block that did not become a particle, and why.

    Attributes:
        name: qualified name of the block.
        reason: why, in words.
        branches: number of its residual additions.
        foldable: whether its parameters could take the step (it stays for another reason then).
    """

    name: str
    reason: str
    branches: int = 1
    foldable: bool = True

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class StageReport:
    """One converted stage.

    Attributes:
        name: qualified name of the stage's module.
        particles: for each slot the names of the blocks that are the particle (several where blocks alternate).
        branches: number of residual additions in one particle.
        parameters: qualified names of the parameters that take the step, with its power, of all particles.
        foldable: whether the step can be folded into them.
        checked: whether exchange and scaling were proven with numbers (not possible on the meta device).
        module: the stage itself; ``None`` in the report of a folded model.
    """

    name: str
    particles: tuple[tuple[str, ...], ...]
    branches: int
    parameters: tuple[tuple[str, int], ...]
    foldable: bool = True
    checked: bool = True
    module: ConvertedStage | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        first, last = self.particles[0][0], self.particles[-1][-1]
        period = f" of {len(self.particles[0])} blocks each" if len(self.particles[0]) > 1 else ""
        proof = "" if self.checked else "; by structure alone, without numbers"
        fold = "" if self.foldable else "; cannot be folded"
        count = f"{self.branches} residual branch{'es' if self.branches > 1 else ''} in each"
        return f"{self.name}: {len(self.particles)} particles{period}, {first} to {last}, {count}{proof}{fold}"


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`torch_meanfield.convert` did to a model; iterating gives the stages.

    Attributes:
        model: name of the model's class.
        stages: the converted stages.
        fixed: residual blocks that are no particles, with the reasons.
        fold_error: in the report of a folded model: the largest difference to the converted model's outputs on the
            example, relative to the largest output.
    """

    model: str
    stages: tuple[StageReport, ...]
    fixed: tuple[FixedBlock, ...]
    fold_error: float | None = None

    def __iter__(self) -> Iterator[StageReport]:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.stages)

    @property
    def particles(self) -> int:
        """Particles of all stages."""
        return sum(len(s.particles) for s in self.stages)

    @property
    def branches(self) -> int:
        """Residual branches of all particles."""
        return sum(s.branches * len(s.particles) for s in self.stages)

    def __str__(self) -> str:
        head = f"{self.model}: {len(self.stages)} stages, {self.particles} particles, {self.branches} branches"
        if self.fold_error is not None:
            head += f"; folded with a relative error of {self.fold_error:.1e}"
        lines = [f"  {s}" for s in self.stages] + [f"  fixed {f}" for f in self.fixed]
        return "\n".join([head, *lines])


@dataclass
class ConversionRecord:
    """Kept in the ``__dict__`` of the converted model: the report without modules, and the example input."""

    report: ConversionReport
    example: Any


Record = ConversionRecord  # its name in models that version 0.1 pickled


def conversion_report(model: nn.Module) -> ConversionReport:
    """Which blocks of a converted model are particles, which are not, and why.

    Args:
        model: a model that :func:`torch_meanfield.convert` or :func:`torch_meanfield.fold` returned, a copy of one,
            or a module that holds exactly one (a ``LightningModule``, an ``AveragedModel``). Names are relative to
            the converted model.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it is not converted, or holds several converted models.

    Example:
        >>> from torch_meanfield import convert
        >>> from torch_meanfield.convert.small_network import residual_network
        >>> report = conversion_report(convert(residual_network(), torch.randn(2, 4)))
        >>> report.stages[0].module.steps().tolist()
        [1.0, 1.0, 1.0]
    """
    owner, record = find_record(model, "conversion_report")
    modules = dict(owner.named_modules())
    stages = []
    for s in record.report.stages:
        module = modules.get(s.name)
        stages.append(replace(s, module=module if isinstance(module, ConvertedStage) else None))
    return replace(record.report, stages=tuple(stages))


def find_record(model: nn.Module, caller: str) -> tuple[nn.Module, ConversionRecord]:
    """The converted model in ``model`` and its record, or an error in the name of ``caller``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
    found = [(m, m.__dict__[RECORD]) for m in model.modules() if RECORD in m.__dict__]
    if not found:
        raise ValueError(f"{caller}: {type(model).__name__} is not converted; torch_meanfield.convert(model) does it")
    if len(found) > 1:
        names = [n for n, m in model.named_modules() if RECORD in m.__dict__]
        raise ValueError(f"{caller}: {type(model).__name__} holds several converted models, {names}; pass one of them")
    return found[0]
