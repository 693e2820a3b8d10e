"""What a diagnosis holds, and how it prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch_meanfield.theory.diagnosis.parts import Finding, Kernel, Layer, Particles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 60  # rows of the table; of longer ones the middle is left out


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Result of :func:`diagnose`. Printing it gives the table and the findings; :meth:`plot` draws it.

    Attributes:
        model: The class of the model.
        batch: Number of inputs.
        loss: The loss's value, and ``loss_name`` what it was.
        loss_name: ``"cross entropy"``, ``"squared error"``, ``"random linear functional"`` or ``"given loss"``.
        layers: In the order of execution.
        particles: The mean-field stacks.
        kernel: The tangent kernel.
        findings: What stands out, the worst first; empty if nothing does.
    """

    model: str
    batch: int
    loss: float
    loss_name: str
    layers: tuple[Layer, ...]
    particles: tuple[Particles, ...]
    kernel: Kernel
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        head = f"{self.model} on {self.batch} inputs; {self.loss_name} {self.loss:.4g}"
        lines = [head, "", *_table(self.layers)]
        for p in self.particles:
            low, high = min(p.steps), max(p.steps)
            lines.append(f"{p.name}: {len(p.steps)} particles, horizon {p.horizon:.3g}, steps {low:.3g} to {high:.3g}")
            lines += _blocks(p)
        k = self.kernel
        if k.skipped:
            lines.append(f"tangent kernel: not computed, {k.skipped}")
        else:
            low, high = k.eigenvalues[0].item(), k.eigenvalues[-1].item()
            lines.append(f"tangent kernel on {k.samples} inputs: eigenvalues {low:.3g} to {high:.3g}")
        lines.append("")
        lines += [f"- {f}" for f in self.findings] or ["Nothing stands out."]
        return "\n".join(lines)

    def plot(self) -> Figure:
        """The layers' lengths, correlations, gradients and dead units, and the kernel's spectrum, as one figure.

        Returns:
            A figure bound to no window; ``figure.savefig(path)`` writes it.

        Raises:
            ImportError: Matplotlib is not installed.
        """
        from torch_meanfield.theory.diagnosis.plot import draw

        title = f"{self.model}, {self.batch} inputs, {self.loss_name} {self.loss:.4g}"
        return draw(title, self.layers, self.particles, self.kernel, self.findings)


def _blocks(p: Particles) -> list[str]:
    """What was measured of a stack's blocks, two numbers a line."""
    lines = []
    if p.effective_horizon == p.effective_horizon:
        lines.append(f"    effective horizon {p.effective_horizon:.3g}")
    for what, values in (("loss without a block", p.removal), ("price of an exchange", p.exchange)):
        if values:
            lines.append(f"    {what}: {min(values):+.2g} (place {values.index(min(values))}) to {max(values):+.2g}")
    return lines


_COLUMNS = (
    "layer",
    "kind",
    "q",
    "corr",
    "gradient",
    "d weight",
    "then",
    "dead %",
    "dormant %",
    "chi",
    "depth",
    "spread V",
)


def _table(layers: tuple[Layer, ...]) -> list[str]:
    rows = [_COLUMNS, *(_row(layer) for layer in layers)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = ["  ".join(v.ljust(w) if i < 2 else v.rjust(w) for i, (v, w) in enumerate(zip(row, widths, strict=True)))
             for row in rows]  # fmt: skip
    if len(lines) > _SHOWN + 1:
        left_out = len(lines) - 1 - _SHOWN
        half = _SHOWN // 2
        lines = [*lines[: half + 1], f"... {left_out} more layers ...", *lines[-half:]]
    return [line.rstrip() for line in lines] + [""]


def _row(a: Layer) -> tuple[str, ...]:
    then = " ".join(part for part in (a.norm, a.activation) if part)
    dead, dormant = ("" if v != v else f"{100 * v:.0f}" for v in (a.dead, a.dormant))
    numbers = (a.q, a.correlation, a.gradient, a.weight_gradient)
    return (
        a.name,
        a.kind,
        *map(_number, numbers),
        then,
        dead,
        dormant,
        *map(_number, (a.chi, a.depth_scale, a.potential_spread)),
    )


def _number(value: float) -> str:
    return "" if value != value else f"{value:.3g}"
