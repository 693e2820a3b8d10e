"""From numbers to sentences: what stands out, and what to do about it. One function for each kind of finding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median

from torch_meanfield.theory.diagnosis.advise_on_blocks import advise_on_blocks
from torch_meanfield.theory.diagnosis.parts import SKIP, Finding, Kernel, Layer, Particles

# Where a number begins to stand out. A factor of 30 in gradient norms between neighbours of a classifier is common.
GRADIENT_RATIO = 100.0
LENGTH_RATIO = 1e4
ALIKE = 0.99
DEAD = 0.1
EXTREME = 20.0
SMALL_STEP = 0.02  # of the mean step
CONDITION = 1e6


def advise(layers: Sequence[Layer], particles: Sequence[Particles], kernel: Kernel, loss: float) -> list[Finding]:
    """Every finding, the worst first."""
    broken = list(_not_finite(layers, loss))
    if broken:
        return broken  # everything else would follow from it
    return [
        *_gradients(layers),
        *_lengths(layers),
        *_correlations(layers),
        *_asleep(layers),
        *_dead(layers),
        *_dormant(layers),
        *_potentials(layers),
        *_steps(particles),
        *advise_on_blocks(particles, loss),
        *_kernel(kernel),
    ]


def _not_finite(layers: Sequence[Layer], loss: float) -> Iterator[Finding]:
    for layer in layers:
        if not math.isfinite(layer.q):
            yield Finding(
                layer.name,
                "the first layer whose output is not finite; look at what it reads and at its weights, and make them "
                "smaller or normalise before it.",
            )
            return
    bad = [layer for layer in layers if math.isinf(layer.gradient) or (math.isnan(layer.gradient) and _reached(layers))]
    if bad:
        advice = _remedy(layers, "down")
        yield Finding(
            bad[-1].name, f"the gradient is not finite from here back to the input, so no step can be taken; {advice}."
        )
    elif not math.isfinite(loss):
        yield Finding(
            "loss", "it is not finite although every layer's output is; look at the loss function and its targets."
        )


def _reached(layers: Sequence[Layer]) -> bool:
    return not any(math.isfinite(layer.gradient) for layer in layers)


def _stream(layers: Sequence[Layer]) -> list[Layer]:
    """Where signals can be compared: the residual stream if there is one, else all layers but the last."""
    sums = [layer for layer in layers if layer.kind == SKIP]
    return sums if len(sums) >= 3 else [layer for layer in layers[:-1] if layer.kind != SKIP]


def _gradients(layers: Sequence[Layer]) -> Iterator[Finding]:
    inner = [layer for layer in _stream(layers) if math.isfinite(layer.gradient)]
    if len(inner) < 3:
        return
    first, last = inner[0], inner[-1]
    if first.gradient == 0:
        lost = [layer for layer in inner if layer.gradient == 0][-1]
        yield Finding(
            f"{first.name} .. {lost.name}",
            f"no gradient arrives at all, so these layers cannot learn; {_remedy(layers, 'up')}.",
        )
        return
    ratio = first.gradient / last.gradient if last.gradient else math.inf
    if 1 / GRADIENT_RATIO < ratio < GRADIENT_RATIO:
        return
    rate = ratio ** (2 / (len(inner) - 1))
    what = "explode" if ratio > 1 else "vanish"
    measured = f"gradients {what} by a factor {max(ratio, 1 / ratio):.2g} going back, {rate:.3g} a layer when squared"
    chi = [layer.chi for layer in inner if math.isfinite(layer.chi)]
    predicted = f" (predicted without skip connections: {median(chi):.3g})" if chi else ""
    yield Finding(
        f"{first.name} .. {last.name}", f"{measured}{predicted}; {_remedy(layers, 'down' if ratio > 1 else 'up')}."
    )


def _remedy(layers: Sequence[Layer], direction: str) -> str:
    gains = [layer.critical_gain for layer in layers if math.isfinite(layer.critical_gain)]
    if any(layer.norm == "batch_norm" for layer in layers) and direction == "down":
        return "batch norm does this without skip connections (tanh 1.18, ReLU 1.47 a layer): add them, or leave it out"
    if not gains:
        return "initialise on the edge of chaos (theory.critical), or add skip connections"
    return (
        f"multiply the weights by about {median(gains):.3g}, which makes chi one, use orthogonal weights "
        f"(theory.delta_orthogonal_), or add skip connections"
    )


def _lengths(layers: Sequence[Layer]) -> Iterator[Finding]:
    inner = [layer for layer in _stream(layers) if layer.q > 0]
    if len(inner) < 3:
        return
    low, high = min(inner, key=lambda a: a.q), max(inner, key=lambda a: a.q)
    if high.q / low.q > LENGTH_RATIO:
        yield Finding(
            f"{low.name}, {high.name}",
            f"mean squares of outputs differ by a factor {high.q / low.q:.2g} ({low.q:.2g} and {high.q:.2g}), "
            f"which few learning rates suit; normalise, or bring sigma_w to where lengths settle (theory.phase).",
        )


def _correlations(layers: Sequence[Layer]) -> Iterator[Finding]:
    known = [layer for layer in _stream(layers) if math.isfinite(layer.correlation)]
    if len(known) < 2 or known[0].correlation >= ALIKE:
        return
    alike = [layer for layer in known[1:] if layer.correlation > ALIKE]
    if alike:
        scale = [a.depth_scale for a in layers if math.isfinite(a.depth_scale)]
        predicted = f", predicted depth scale {median(scale):.3g} layers" if scale else ""
        yield Finding(
            alike[0].name,
            f"from here on different inputs give nearly the same output (correlation {alike[0].correlation:.4f}"
            f"{predicted}); make the network shallower, its weights larger or its biases smaller, or add batch norm.",
        )


def _asleep(layers: Sequence[Layer]) -> Iterator[Finding]:
    """Branches behind a scale of 0 or nearly so: a way to initialise, worth knowing when they never wake."""
    sums = [layer.gradient for layer in layers if layer.kind == SKIP and layer.gradient > 0]
    if not sums:
        return
    asleep = [layer for layer in layers if layer.kind != SKIP and layer.gradient < 1e-4 * min(sums)]
    if asleep:
        yield Finding(
            asleep[0].name + (f" and {len(asleep) - 1} more" if len(asleep) > 1 else ""),
            "hardly any gradient reaches these layers while the skip connections around them carry it: their branches "
            "end in a scale near 0, which is as meant in a fresh network and not in a trained one; look at that scale.",
        )


def _dead(layers: Sequence[Layer]) -> Iterator[Finding]:
    dead = [layer for layer in layers if layer.dead > DEAD]
    if dead:
        worst = max(dead, key=lambda a: a.dead)
        yield Finding(
            f"{worst.name}" + (f" and {len(dead) - 1} more" if len(dead) > 1 else ""),
            f"{100 * worst.dead:.0f} % of the units answer all inputs alike and learn nothing; wrap the optimizer in "
            f"BirthDeathOptimizer, which revives them, or lower the learning rate or the biases.",
        )


def _dormant(layers: Sequence[Layer]) -> Iterator[Finding]:
    dormant = [layer for layer in layers if layer.dormant > DEAD >= layer.dead]
    if dormant:
        worst = max(dormant, key=lambda a: a.dormant)
        yield Finding(
            f"{worst.name}" + (f" and {len(dormant) - 1} more" if len(dormant) > 1 else ""),
            f"{100 * worst.dormant:.0f} % of the units are dormant or nearly so, they change with the input by less "
            f"than 2.5 % of what the others do; BirthDeathOptimizer replaces those that no longer reach anything.",
        )


def _potentials(layers: Sequence[Layer]) -> Iterator[Finding]:
    found = [layer for layer in layers if layer.potential_extreme > EXTREME]
    if found:
        worst = max(found, key=lambda a: a.potential_extreme)
        yield Finding(
            worst.name,
            f"one of the units it reads has a potential {worst.potential_extreme:.0f} deviations from the others', so "
            f"the loss hangs on it; birth and death (BirthDeathOptimizer) would act here.",
        )


def _steps(particles: Sequence[Particles]) -> Iterator[Finding]:
    for p in particles:
        mean = p.horizon / len(p.steps)
        small = sum(step < SMALL_STEP * mean for step in p.steps)
        if small:
            yield Finding(
                p.name,
                f"{small} of {len(p.steps)} particles take steps below {SMALL_STEP:.0%} of the mean and hardly act; "
                f"they can be left out, or placed anew with set_tau_.",
            )


def _kernel(kernel: Kernel) -> Iterator[Finding]:
    if kernel.skipped:
        return
    low, high = kernel.eigenvalues[0].item(), kernel.eigenvalues[-1].item()
    if low < high / CONDITION or high == 0:
        steps = f"for about {high / low:.0g} steps" if low > 1e-12 * high else "at all"
        yield Finding(
            "tangent kernel",
            f"its eigenvalues reach from {low:.2g} to {high:.2g}: gradient descent cannot tell some inputs apart "
            f"{steps}; look for duplicates in the batch, or for the layer from which correlations are near 1.",
        )
