"""The parts of a diagnosis: layers, mean-field stacks, the tangent kernel and what stands out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

SKIP = "skip"  # the kind of a row that is no layer but the sum of a skip connection


@dataclass(frozen=True)
class Layer:
    """One call of one layer with weights, or one sum of a skip connection. ``nan``: does not apply, or is not known.

    Attributes:
        name: The module's, ``[k]`` behind it from its second call on, ``+`` behind it for the sum after it.
        kind: Its class, or ``"skip"`` for a sum: a point of the residual stream.
        q: Mean square of its outputs.
        correlation: Mean over pairs of inputs of the product of their outputs, over their mean square.
        gradient: Norm of the loss's gradient by its outputs, the whole batch's.
        weight_gradient: Norm of the loss's gradient by its parameters.
        activation: Name of the activation behind it, ``""`` if none was seen before the next layer.
        norm: Name of the normalisation between, or ``""``.
        dead: Share of the units behind that activation with one and the same output for every input and position.
        dormant: Share of them whose output hardly changes: its deviation over inputs and positions is below 2.5 % of
            the layer's mean one. The dead are among them.
        chi: Predicted factor on squared gradient norms, going back through one such layer and what follows it, in a
            stack of such layers without skip connections.
        depth_scale: Predicted depth, in such layers, over which squared gradients, or (without normalisation)
            correlations, change by a factor e: whichever is less.
        critical_gain: Factor on the weights that brings chi to 1; ``nan`` behind normalisation.
        potential_spread: Deviation of the potentials of the units the layer reads, times their number, in units of the
            loss; ``nan`` where units are not single input channels.
        potential_extreme: The potential furthest from their mean, in deviations.
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
    dormant: float = float("nan")
    chi: float = float("nan")
    depth_scale: float = float("nan")
    critical_gain: float = float("nan")
    potential_spread: float = float("nan")
    potential_extreme: float = float("nan")


@dataclass(frozen=True)
class Particles:
    """One mean-field stack. What could not be measured is empty or ``nan``, as of a stack that runs twice in a pass.

    Attributes:
        name: The module's.
        horizon: The last tau.
        steps: The n step sizes.
        removal: What the loss on the batch changes by without each block, measured.
        exchange: What it would change by if neighbours l and l + 1 changed places, ``n - 1`` predicted prices: see
            :func:`.exchange_prices`, of second order for cross entropy and squared error.
        effective_horizon: The way that the blocks take the stream, in its own lengths: the sum over blocks of the root
            mean square of what they add over that of what they read. 0 is no depth at all.
    """

    name: str
    horizon: float
    steps: tuple[float, ...]
    removal: tuple[float, ...] = ()
    exchange: tuple[float, ...] = ()
    effective_horizon: float = float("nan")


@dataclass(frozen=True, eq=False)
class Kernel:
    """The tangent kernel on part of the batch, of the outputs along one random direction, in ``eval()`` mode.

    Attributes:
        samples: Number of inputs.
        eigenvalues: Ascending, float64 ``(samples,)``; empty if it was not computed.
        skipped: Why it was not computed, or ``""``.
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
