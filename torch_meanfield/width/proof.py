"""The proof that a population is one: permute it, run, compare.

On fresh weights the comparison says nothing: gains are all one, statistics all alike, some weights zero, and a
population that lacks half of its columns passes. So it is made on a private copy whose every parameter and statistic
is random, in double precision, and it has two halves: the whole permutation must leave the output as it is, and the
permutation of the incoming columns alone must not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_meanfield.observe import private_copy, run, tensors_in, undisturbed
from torch_meanfield.observe.randomise import Draws, draw_, nudge_, randomise_
from torch_meanfield.particles import Population, Slice, transport_
from torch_meanfield.particles.population import named_tensors
from torch_meanfield.width.neurons import Neurons

UNCHANGED = 1e-10  # relative; true populations reach 1e-14
CHANGED = 1e-7  # a thousand times that: what the proof could not see, it must not call unchanged
CYCLE = 64  # units whose exchange is read off the gradient
NUDGE = 1e-13
MAGNIFIED = 100.0  # rounding errors of 1e-15 then stay three orders below what counts as unchanged


@dataclass(frozen=True)
class Verdict:
    """What the proof found about one population.

    Attributes:
        population: as it was given.
        change: relative change of the output when the whole population is permuted (jointly with the others, or alone).
        producer_change: the same when its incoming columns alone are permuted (or, to first order and equivalently
            for a population that passed the first half, its outgoing ones, see :meth:`Prover.prove`).
        reason: why it is not proven; ``None`` if it is.
    """

    population: Neurons
    change: float
    producer_change: float
    reason: str | None = None

    @property
    def proven(self) -> bool:
        """Whether the population is exchangeable, and the proof not vacuous."""
        return self.reason is None

    def __str__(self) -> str:
        p = self.population
        if self.reason is not None:
            return f"{p.name} ({p.size} units): refused: {self.reason}"
        return f"{p.name} ({p.size} units): proven, {self.change:.0e} permuted and {self.producer_change:.0e} in part"


class Prover:
    """A randomised double-precision copy of a model, and its output.

    Args:
        model: any module; it is not touched.
        example_input: what it is called with, see :func:`torch_meanfield.observe.run`; floating tensors become doubles.
        seed: of the random parameters and permutations.

    Raises:
        TypeError, ValueError: ``model`` is not a module, cannot be copied, or gives no finite output.
    """

    def __init__(self, model: nn.Module, example_input: Any, *, seed: int = 0) -> None:
        self.model = model
        self.copy = private_copy(model).double()
        for parameter in self.copy.parameters():
            parameter.requires_grad_(parameter.is_floating_point())  # frozen ones take part in the proof
        mine, theirs = named_tensors(model), named_tensors(self.copy)
        self.theirs = {id(t): theirs[name] for name, t in mine.items() if name in theirs}
        self.draws = Draws(seed)
        self.generator = self.draws.generator
        self.seed = seed
        self.example = _double(example_input)
        for scale in (1.0, 0.5, 0.25, 0.1):
            if self._randomise(scale):
                break
        if not self._is_sound():
            raise ValueError(
                f"verify: {type(model).__name__} gives no finite, non-zero floating-point output on the example with "
                f"random parameters; pass an example_input of the kind it is trained on"
            )

    def _is_sound(self) -> bool:
        return bool(self.output.numel()) and bool(self.output.isfinite().all()) and self.magnitude > 0

    @torch.no_grad()
    def _randomise(self, scale: float) -> bool:
        """New random parameters; whether the output is finite and well-conditioned in them."""
        # Saturated attention and activations that grow from block to block magnify rounding errors (to 1e-9 and more)
        # or hide whole layers. So the parameters are moved in the thirteenth digit: the output must move little more.
        randomise_(self.copy, self.draws, scale)
        self.output = self.run()
        if not self._is_sound():
            return False
        nudge_(self.copy, self.draws, NUDGE)
        moved = self.run()
        change, self.output = self._distance(moved), moved
        return change <= MAGNIFIED * NUDGE

    def run(self, *, gradients: bool = False) -> Tensor:
        """The outputs, flattened into one vector."""
        with undisturbed(self.seed), torch.set_grad_enabled(gradients):
            self.copy.train()  # clears tables that some models cache in eval mode
            self.copy.eval()
            outputs = tensors_in(run(self.copy, self.example))
            vectors = [o.reshape(-1).double().cpu() for o in outputs if o.is_floating_point()]
            return torch.cat(vectors) if vectors else torch.empty(0)

    def _cycle(self, n: int) -> Tensor:
        """A random cycle of all n: it leaves no unit in its place."""
        order = torch.randperm(n, generator=self.generator)
        index = torch.empty_like(order)
        index[order] = order.roll(1)
        return index

    @property
    def magnitude(self) -> float:
        """The largest output."""
        return float(self.output.abs().max())

    def _distance(self, now: Tensor) -> float:
        """How far an output is from the reference, relative to its largest entry; infinite if not a number."""
        change = float((now - self.output).abs().max()) / self.magnitude if now.shape == self.output.shape else math.inf
        return math.inf if math.isnan(change) else change

    def change_when(self, populations: Iterable[Neurons], *, only_incoming: bool = False) -> float:
        """The change when ``populations`` (of this copy) are permuted, each by a random cycle of all its units."""
        moved = []
        for p in populations:
            part = Population(p.incoming, owner=self.copy, name=p.name) if only_incoming else p
            index = self._cycle(p.size)
            transport_(part, index, cause="verify", state=False)
            moved.append((part, index))
        try:
            change = self._distance(self.run())
        except (RuntimeError, ValueError):  # an input-dependent branch taken elsewhere
            change = math.inf
        if change > UNCHANGED or only_incoming:  # else the copy is as good as it was
            for part, index in reversed(moved):
                transport_(part, index.argsort(), cause="verify", state=False)
        return change

    def prove(self, populations: Sequence[Neurons], *, literally: bool = True) -> list[Verdict]:
        """A verdict for each population: all in one joint forward, by halves only where that fails.

        Args:
            populations: of the model.
            literally: permute the incoming columns of each population alone, one forward for each. ``False`` reads
                off one backward pass for all how permuting the outgoing columns alone changes the output to first
                order. For a population that the joint permutation P leaves unchanged, P on the incoming (and own)
                columns is the inverse of P on the outgoing ones, and these enter linearly; where the first order says
                nothing, the literal test decides.

        Raises:
            ValueError: a population that is not of this model, or that has no incoming column.
        """
        twins = [self._twin(p) for p in populations]
        for p in populations:
            if not p.incoming:
                raise ValueError(f"{p.name}: no column has the role 'in', so there is no part of it to permute alone")
        self._draw_constants(twins)
        changes = self._joint(twins)
        slopes = [0.0] * len(twins) if literally or not twins else self._slopes(twins)
        return [self._verdict(*given) for given in zip(populations, twins, changes, slopes, strict=True)]

    def _twin(self, population: Neurons) -> Neurons:
        # ``within`` lists every tensor of both models for each population: seconds, for hundreds of populations.
        columns = population.slices(population.columns)
        if population.owner is not self.model or any(id(c.tensor) not in self.theirs for c in columns):
            return population.within(self.copy)
        twins = [Slice(self.theirs[id(c.tensor)], c.dim, c.outer, c.inner) for c in columns]
        return Neurons(twins, population.roles, self.copy, population.name)

    def _draw_constants(self, twins: Sequence[Neurons]) -> None:
        # A buffer that a population claims (the zero key bias in a fused qkv bias) must be seen to move as well.
        learned = {id(p) for p in self.copy.parameters()}
        claimed = {id(c.tensor): c.tensor for t in twins for c in t.own + t.incoming + t.outgoing}
        statistics = {id(b) for n, b in self.copy.named_buffers() if n.endswith(("running_mean", "running_var"))}
        constants = [t for i, t in claimed.items() if i not in learned and i not in statistics]
        for tensor in constants:
            draw_(tensor, self.draws)
        if constants:
            self.output = self.run()

    def _joint(self, twins: Sequence[Neurons]) -> list[float]:
        if not twins:
            return []
        change = self.change_when(twins)
        if change <= UNCHANGED or len(twins) == 1:
            return [change] * len(twins)
        half = len(twins) // 2
        return self._joint(twins[:half]) + self._joint(twins[half:])

    @torch.no_grad()
    def _slopes(self, twins: Sequence[Neurons]) -> list[float]:
        """To first order, how a permutation of each one's outgoing columns changes a random mean of the outputs."""
        outgoing = list({id(c.tensor): c.tensor for t in twins for c in t.outgoing}.values())
        try:
            output = self.run(gradients=True)
            weights = torch.randn(output.shape, generator=self.generator, dtype=output.dtype)
            with torch.enable_grad():
                gradients = torch.autograd.grad(output @ (weights / weights.norm()), outgoing, allow_unused=True)
        except RuntimeError:  # no gradient through this model's eval mode: each is tested literally
            return [0.0] * len(twins)
        by_tensor = {id(t): g for t, g in zip(outgoing, gradients, strict=True)}
        slopes = []
        for twin in twins:
            # A cycle of some of the units: all of a large tensor would cost more than a forward.
            units, slope = torch.randperm(twin.size, generator=self.generator)[:CYCLE], 0.0
            for c in twin.outgoing:
                gradient = by_tensor[id(c.tensor)]
                if gradient is not None:
                    here = units.to(gradient.device)
                    view, pull = (c.by_particle(t).index_select(c.dim + 1, here) for t in (c.tensor, gradient))
                    slope += float(((view.roll(1, c.dim + 1) - view) * pull).sum())
            slopes.append(abs(slope) / self.magnitude)
        return slopes

    def _verdict(self, population: Neurons, twin: Neurons, change: float, slope: float) -> Verdict:
        if not change <= UNCHANGED:
            return Verdict(population, change, math.nan, f"permuting it changes the output by {change:.0e}")
        part = slope if slope >= CHANGED else self.change_when([twin], only_incoming=True)
        reason = None if part >= CHANGED else f"the proof is vacuous: its incoming columns alone change {part:.0e}"
        return Verdict(population, change, part, reason)


def verify(
    model: nn.Module, example_input: Any, populations: Sequence[Neurons] | None = None, *, seed: int = 0
) -> list[Verdict]:
    """Prove that populations are exchangeable: permuting their units changes no output of the network.

    On a private copy with random parameters and statistics, in double precision and ``eval()``: a random joint
    permutation of all populations must leave the output within 1e-10 of its largest entry, and permuting the
    incoming columns of one alone must not. ``model`` is left exactly as it is.

    Args:
        model: the network.
        example_input: what it is called with: a tensor, a tuple of arguments, or a dict of keywords. One example of a
            small size is enough.
        populations: of this model; ``None`` for those of :func:`torch_meanfield.width.find_populations`.
        seed: of the random parameters and permutations.

    Returns:
        one :class:`Verdict` for each population, in order.

    Raises:
        TypeError: ``model`` is not a module, or a population is not :class:`Neurons`.
        ValueError: a model that cannot be copied or gives no finite output; a population of another model, or one
            without incoming columns.

    Example:
        >>> from torch_meanfield.width.neurons import neurons_from
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> hidden = neurons_from([(net[0].weight, 0), (net[0].bias, 0), (net[2].weight, 1)], "hidden")
        >>> verify(net, torch.randn(4, 3), [hidden])[0].proven
        True
        >>> verify(net, torch.randn(4, 3), [neurons_from([(net[0].weight, 0), (net[2].weight, 1)])])[0].proven
        False
    """
    if populations is None:
        from torch_meanfield.width.discover import find_populations

        populations = find_populations(model, example_input, seed=seed).populations
    for i, p in enumerate(populations):
        if not isinstance(p, Neurons):
            raise TypeError(
                f"verify: populations[{i}] must be Neurons, got {type(p).__name__}; neurons_from() makes one of a "
                f"list of slices"
            )
    prover = Prover(model, example_input, seed=seed)
    return prover.prove([p if p.owner is not None else Neurons(p.columns, p.roles, model, p.name) for p in populations])


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value.detach()
    if isinstance(value, Mapping):
        return {k: _double(v) for k, v in value.items()}
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_double(v) for v in value)
    if isinstance(value, list):
        return [_double(v) for v in value]
    return value
