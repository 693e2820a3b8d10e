"""The proof that a population is one: permute it, run, compare.

On fresh weights the comparison says nothing: gains are all one, statistics all alike, some weights zero, and a
population that lacks half of its columns passes. So it is made on a private copy whose every parameter and statistic
is random, in double precision, and it has two halves: the whole permutation must leave the output as it is, and the
permutation of the incoming columns alone must not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from torch_meanfield.observe import InDouble, anew, fake_quantiser, left_out, private_copy, run, tensors_in, undisturbed
from torch_meanfield.observe.randomise import Draws, draw_, nudge_, randomise_
from torch_meanfield.particles import Population, Slice, transport_
from torch_meanfield.particles.neurons import Neurons
from torch_meanfield.particles.population import named_tensors

UNCHANGED = 1e-10  # relative; true populations reach 1e-14
CHANGED = 1e-7  # a thousand times that: what the proof could not see, it must not call unchanged
CYCLE = 64  # units whose exchange is read off the gradient
NUDGE = 1e-13
SCALES = (1.0, 0.5, 0.25, 0.1)  # factors on the random matrices, in the order they are tried
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
        seed: Seed of the random parameters and permutations.

    Raises:
        TypeError, ValueError: ``model`` is not a module, cannot be copied, or gives no finite output.
    """

    def __init__(self, model: nn.Module, example_input: Any, *, seed: int = 0) -> None:
        quantiser = fake_quantiser(model) if isinstance(model, nn.Module) else None
        if quantiser is not None:
            raise ValueError(
                f"verify: {type(model).__name__} rounds by a fake quantiser, {quantiser}, which computes in single "
                f"precision; a proof needs double. Find and prove populations before quantisation-aware training"
            )
        self.model = model
        self.copy = _double_copy(model)
        for parameter in self.copy.parameters():
            parameter.requires_grad_(parameter.is_floating_point())  # frozen ones take part in the proof
        mine, theirs = named_tensors(model), named_tensors(self.copy)
        self.theirs = {id(t): theirs[name] for name, t in mine.items() if name in theirs}
        self.draws = Draws(seed)
        self.generator = self.draws.generator
        self.seed = seed
        self.given, self.example = example_input, anew(_double, example_input)
        self.graph: Tensor | None = None  # the output of the last forward with gradients, while it can be used
        self.mode: type[InDouble] | type[nullcontext[None]] = InDouble
        self.scales = iter(SCALES)
        self.settled = False  # whether the output is known to be well-conditioned in the parameters
        try:
            self._begin()
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"verify: {type(model).__name__} does not run on the example_input in double precision "
                f"({type(error).__name__}: {error}); pass one that it takes{left_out(model)}"
            ) from error

    def _begin(self) -> bool:
        """Random parameters of the next scale that gives a sound output; whether there is one."""
        for scale in self.scales:
            randomise_(self.copy, self.draws, scale)
            try:
                self.output = self.run()
            except RuntimeError:  # it makes single-precision numbers in a way that cannot be seen, and mixes the two
                self.mode = nullcontext
                self.output = self.run()
            if self._is_sound():
                nudge_(self.copy, self.draws, NUDGE)
                return True
        if not self._is_sound():
            raise ValueError(
                f"verify: {type(self.model).__name__} gives no finite, non-zero floating-point output on the example "
                f"with random parameters; pass an example_input of the kind it is trained on"
            )
        return False

    def _is_sound(self) -> bool:
        return bool(self.output.numel()) and bool(self.output.isfinite().all()) and self.magnitude > 0

    def _settle(self) -> bool:
        """Go on to smaller parameters until the output is well-conditioned in them; whether it was at once."""
        # Saturated attention and activations that grow from block to block magnify rounding errors (to 1e-9 and more)
        # or hide whole layers. So the parameters are moved in the thirteenth digit: the output must move little more.
        at_once = True
        while not self.settled:
            moved = self.run()
            change, self.output = self._distance(moved), moved
            self.settled = change <= MAGNIFIED * NUDGE or not self._begin()
            at_once = at_once and change <= MAGNIFIED * NUDGE
        return at_once

    def run(self, *, gradients: bool = False) -> Tensor:
        """The outputs, flattened into one vector."""
        with undisturbed(self.seed), torch.set_grad_enabled(gradients), self.mode():
            self.copy.train()  # clears tables that some models cache in eval mode
            self.copy.eval()
            outputs = tensors_in(run(self.copy, self.example))
            vectors = [o.reshape(-1).double().cpu() for o in outputs if o.is_floating_point()]
            return torch.cat(vectors) if vectors else torch.empty(0)

    def as_given(self) -> tuple[nn.Module, Any]:
        """A copy for a look that depends on shapes alone, and its example: the model's own numbers where they will do.

        They are half as long, and computing with them takes half the time; not so in half precision on a CPU.
        """
        single = all(t.dtype == torch.float32 for t in (*self.model.parameters(), *tensors_in(self.given)))
        if not single:
            return self.copy, self.example
        return private_copy(self.model, share_parameters=True), self.given

    def _cycle(self, n: int) -> Tensor:
        """A random cycle of all n: it leaves no unit in its place."""
        order = torch.randperm(n, generator=self.generator, device="cpu")
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

    def change_when(
        self, populations: Iterable[Neurons], *, only_incoming: bool = False, gradients: bool = False
    ) -> float:
        """The change when ``populations`` (of this copy) are permuted, each by a random cycle of all its units.

        Args:
            gradients: Keep the output with its history in :attr:`graph`, if it is unchanged.
        """
        self.graph = None
        if only_incoming:
            self._settle()
        populations = list(populations)
        moved = []
        for p in populations:
            part = Population(p.incoming, owner=self.copy, name=p.name) if only_incoming else p
            index = self._cycle(p.size)
            transport_(part, index, cause="verify", state=False)
            moved.append((part, index))
        try:
            output = self.run(gradients=gradients)
            change = self._distance(output.detach())
        except (RuntimeError, ValueError):  # an input-dependent branch taken elsewhere
            output, change = None, math.inf
        # Parameters that were both nudged and permuted and gave so nearly the same output are proven well-conditioned
        # too, and one forward has been saved.
        if not self.settled and output is not None and change <= MAGNIFIED * NUDGE:
            self.settled, self.output = True, output.detach()
        if change <= UNCHANGED and self.settled and not only_incoming:  # the copy is as good as it was
            self.graph = output if gradients else None
            return change
        for part, index in reversed(moved):
            transport_(part, index.argsort(), cause="verify", state=False)
        return change if self._settle() else self.change_when(populations, gradients=gradients)

    def prove(self, populations: Sequence[Neurons], *, literally: bool = True) -> list[Verdict]:
        """A verdict for each population: all in one joint forward, by halves only where that fails.

        Args:
            populations: Populations of the model.
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
                raise ValueError(
                    f"{p.name}: no column has the role 'in', so there is no part of it to permute alone; declare the "
                    f"weights that make its units too"
                )
        if literally:
            self._settle()  # on its own: the changes that are reported hold nothing but the permutation
        self._draw_constants(twins)
        changes = self._joint(twins, gradients=not literally)
        slopes = [0.0] * len(twins) if literally or not twins else self._slopes(twins)
        return [self._verdict(*given) for given in zip(populations, twins, changes, slopes, strict=True)]

    def _twin(self, population: Neurons) -> Neurons:
        # ``within`` lists every tensor of both models for each population: seconds, for hundreds of populations.
        columns = population.slices(population.columns)
        if population.owner is not self.model or any(id(c.tensor) not in self.theirs for c in columns):
            return population.within(self.copy)
        twins = [c.on(self.theirs[id(c.tensor)]) for c in columns]
        return Neurons(twins, population.roles, self.copy, population.name)

    def _draw_constants(self, twins: Sequence[Neurons]) -> None:
        # A buffer that a population claims (the zero key bias in a fused qkv bias) must be seen to move as well.
        learned = {id(p) for p in self.copy.parameters()}
        claimed = {id(c.tensor): c.tensor for t in twins for c in t.own + t.incoming + t.outgoing}
        statistics = {id(b) for n, b in self.copy.named_buffers() if n.endswith(("running_mean", "running_var"))}
        constants = [t for i, t in claimed.items() if i not in learned and i not in statistics]
        if constants:
            self._settle()
            for tensor in constants:
                draw_(tensor, self.draws)
            self.output = self.run()

    def _joint(self, twins: Sequence[Neurons], *, gradients: bool = False) -> list[float]:
        if not twins:
            return []
        change = self.change_when(twins, gradients=gradients)
        if gradients and change == math.inf:  # no gradient through this model, perhaps
            change = self.change_when(twins)
        if change <= UNCHANGED or len(twins) == 1:
            return [change] * len(twins)
        half = len(twins) // 2
        return self._joint(twins[:half]) + self._joint(twins[half:])

    @torch.no_grad()
    def _slopes(self, twins: Sequence[Neurons]) -> list[float]:
        """To first order, how a permutation of each one's outgoing columns changes a random mean of the outputs."""
        readers: dict[int, list[tuple[int, Slice, Tensor]]] = {}
        for i, twin in enumerate(twins):
            # A cycle of some of the units: all of a large tensor would cost more than a forward.
            units = torch.randperm(twin.size, generator=self.generator, device="cpu")[:CYCLE]
            for c in twin.outgoing:
                readers.setdefault(id(c.tensor), []).append((i, c, units.to(c.tensor.device)))
        tensors = {id(c.tensor): c.tensor for twin in twins for c in twin.outgoing}
        slopes = [0.0] * len(twins)

        def read(tensor: Tensor) -> None:
            # At once, and the gradient is let go: all of a large model's would be as many numbers as it has.
            gradient, tensor.grad = tensor.grad, None
            assert gradient is not None
            for i, c, units in readers[id(tensor)]:
                view, pull = (c.by_particle(t).index_select(c.dim + 1, units) for t in (tensor, gradient))
                slopes[i] += float(((view.roll(1, c.dim + 1) - view) * pull).sum())

        output, self.graph = self.graph, None
        learned = [t for t in tensors.values() if t.requires_grad]
        hooks = [cast(Any, t).register_post_accumulate_grad_hook(read) for t in learned]
        try:
            if output is None:
                output = self.run(gradients=True)
            weights = torch.randn(output.shape, generator=self.generator, dtype=output.dtype, device="cpu")
            with torch.enable_grad():
                torch.autograd.backward(output @ (weights / weights.norm()), inputs=learned)
        except RuntimeError:  # no gradient through this model's eval mode: each is tested literally
            return [0.0] * len(twins)
        finally:
            for hook in hooks:
                hook.remove()
        return [abs(s) / self.magnitude for s in slopes]

    def _verdict(self, population: Neurons, twin: Neurons, change: float, slope: float) -> Verdict:
        if not change <= UNCHANGED:
            return Verdict(population, change, math.nan, f"permuting it changes the output by {change:.0e}")
        part = slope if slope >= CHANGED else self.change_when([twin], only_incoming=True)
        reason = None if part >= CHANGED else f"the proof is vacuous: its incoming columns alone change {part:.0e}"
        return Verdict(population, change, part, reason)


def _double_copy(model: nn.Module) -> nn.Module:
    """A private copy in double precision; its parameters have no values yet."""
    if not isinstance(model, nn.Module):
        return private_copy(model)  # which says what is wrong
    # They are drawn anew, so for a large model copying and converting them would be most of the work.
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, dtype=torch.float64))
        for p in model.parameters()
        if p.is_floating_point() and type(p) is nn.Parameter
    }
    return private_copy(model, parameters=empty).double()


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor.detach()
