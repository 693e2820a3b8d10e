"""What to do about the blocks of mean-field stacks: too short a way, blocks that can go, a wrong order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch_meanfield.theory.diagnosis.parts import Finding, Particles

CHEAP = 0.01  # of the loss
SHORT = 0.1  # an effective horizon


def advise_on_blocks(particles: Sequence[Particles], loss: float) -> Iterator[Finding]:
    """The findings of every stack."""
    for p in particles:
        yield from _horizon(p)
        yield from _removable(p, loss)
        yield from _exchanges(p, loss)


def _horizon(p: Particles) -> Iterator[Finding]:
    if p.effective_horizon < SHORT:
        yield Finding(
            p.name,
            f"its {len(p.steps)} blocks together change the stream by {p.effective_horizon:.2g} of its length and act "
            f"as one shallow layer; place them further apart with set_tau_, or make the layer with a larger horizon.",
        )


def _removable(p: Particles, loss: float) -> Iterator[Finding]:
    cheap = [i for i, change in enumerate(p.removal) if change < CHEAP * abs(loss)]
    if cheap:
        least = min(cheap, key=p.removal.__getitem__)
        yield Finding(
            p.name,
            f"{len(cheap)} of {len(p.steps)} blocks can be left out, one at a time, for less than {CHEAP:.0%} of the "
            f"loss (block {least}: {p.removal[least]:+.2g}); if the network is trained, prune_depth_ takes them out.",
        )


def _exchanges(p: Particles, loss: float) -> Iterator[Finding]:
    cheap = [i for i, price in enumerate(p.exchange) if price < -CHEAP * abs(loss)]
    if cheap:
        best = min(cheap, key=p.exchange.__getitem__)
        yield Finding(
            p.name,
            f"{len(cheap)} of {len(p.exchange)} exchanges of neighbours are predicted to lower the loss by more than "
            f"{CHEAP:.0%} (blocks {best} and {best + 1}: {p.exchange[best]:+.2g}); theory.exchange_ makes one, "
            f"theory.recover_order_ many.",
        )
