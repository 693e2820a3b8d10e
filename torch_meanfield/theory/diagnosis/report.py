"""What a diagnosis holds, and how it prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SKIP = "skip"  # the kind of a row that is no layer but the sum of a skip connection
_SHOWN = 60  # rows of the table; of longer ones the middle is left out


@dataclass(frozen=True)
class Layer:
    """One call of one layer with weights, or one sum of a skip connection. ``nan``: does not apply, or is not known.

    Attributes:
        name: the module's, ``[k]`` behind it from its second call on, ``+`` behind it for the sum after it.
        kind: its class, or ``"skip"`` for a sum: a point of the residual stream.
        q: mean square of its outputs.
        correlation: mean over pairs of inputs of the product of their outputs, over their mean square.
        gradient: norm of the loss's gradient by its outputs, the whole batch's.
        weight_gradient: norm of the loss's gradient by its parameters.
        activation: name of the activation behind it, ``""`` if none was seen before the next layer.
        norm: name of the normalisation between, or ``""``.
        dead: share of the units behind that activation with one and the same output for every input and position.
        chi: predicted factor on squared gradient norms, going back through one such layer and what follows it, in a
            stack of such layers without skip connections.
        depth_scale: predicted depth, in such layers, over which squared gradients, or (without normalisation)
            correlations, change by a factor e: whichever is less.
        critical_gain: by what to multiply the weights to bring chi to 1; ``nan`` behind normalisation.
        potential_spread: deviation of the potentials of the units the layer reads, times their number, in units of the
            loss; ``nan`` where units are not single input channels.
        potential_extreme: the potential furthest from their mean, in deviations.
    """

    name: str
    kind: str
    q: float
    correlation: float
    gradient: float
    weight_gradient: float = float("nan")
    activation: str = ""
    norm: str = ""
    dead: float = float("nan")
    chi: float = float("nan")
    depth_scale: float = float("nan")
    critical_gain: float = float("nan")
    potential_spread: float = float("nan")
    potential_extreme: float = float("nan")


@dataclass(frozen=True)
class Particles:
    """One mean-field stack: ``horizon`` the last tau, ``steps`` the n step sizes, ``name`` the module's."""

    name: str
    horizon: float
    steps: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Kernel:
    """The tangent kernel on part of the batch, of the outputs along one random direction, in ``eval()`` mode.

    Attributes:
        samples: on how many inputs.
        eigenvalues: ascending, float64 ``(samples,)``; empty if it was not computed.
        skipped: why it was not computed, or ``""``.
    """

    samples: int
    eigenvalues: Tensor
    skipped: str = ""


@dataclass(frozen=True)
class Finding:
    """One thing that stands out: ``subject`` the layers, ``text`` one sentence of what it is and what to do."""

    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.text}"


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Result of :func:`diagnose`. Printing it gives the table and the findings; :meth:`plot` draws it.

    Attributes:
        model: the class of the model.
        batch: number of inputs.
        loss: the loss's value, and ``loss_name`` what it was.
        loss_name: ``"cross entropy"``, ``"squared error"``, ``"random linear functional"`` or ``"given loss"``.
        layers: in the order of execution.
        particles: the mean-field stacks.
        kernel: the tangent kernel.
        findings: what stands out, the worst first; empty if nothing does.
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
            a figure bound to no window; ``figure.savefig(path)`` writes it.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from torch_meanfield.theory.diagnosis.plot import draw

        return draw(self)


_COLUMNS = ("layer", "kind", "q", "corr", "gradient", "d weight", "then", "dead %", "chi", "depth", "spread V")


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
    dead = "" if a.dead != a.dead else f"{100 * a.dead:.0f}"
    numbers = (a.q, a.correlation, a.gradient, a.weight_gradient)
    return (
        a.name,
        a.kind,
        *map(_number, numbers),
        then,
        dead,
        *map(_number, (a.chi, a.depth_scale, a.potential_spread)),
    )


def _number(value: float) -> str:
    return "" if value != value else f"{value:.3g}"
