"""The methods made for networks that must go on learning, each from its paper and as short as it can be.

A method sees the network, the optimizer and the step; it acts before the optimizer does (:meth:`Method.pull`) or after
(:meth:`Method.act`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recipes.plasticity.network import Hidden, Network


class Method:
    """Does nothing: the bare optimizer.

    Args:
        model: the network.
        optimizer: the bare optimizer; methods that re-initialise units clear what it keeps for them.
        generator: their source of randomness.
    """

    def __init__(self, model: Network, optimizer: Optimizer, generator: torch.Generator) -> None:
        self.model, self.optimizer, self.generator, self.steps = model, optimizer, generator, 0

    def pull(self) -> None:
        """Before the optimizer's step, when gradients are there."""

    def act(self) -> None:
        """After it."""

    def reinitialise_(self, hidden: Hidden, units: Tensor) -> None:
        """Incoming weights drawn anew (Kaiming), outgoing weights and bias 0, no optimizer state."""
        weight = hidden.first.weight
        bound, bias = math.sqrt(6 / weight[0].numel()), hidden.first.bias
        assert bias is not None
        with torch.no_grad():
            drawn = torch.empty(len(units), *weight.shape[1:])
            weight[units] = drawn.uniform_(-bound, bound, generator=self.generator)
            bias[units] = 0
            hidden.last.weight[:, units] = 0
            rows: list[tuple[nn.Parameter, int]] = [(weight, 0), (bias, 0), (hidden.last.weight, 1)]
            if hidden.norm is not None:
                hidden.norm.weight[units], hidden.norm.bias[units] = 1.0, 0.0
                rows += [(hidden.norm.weight, 0), (hidden.norm.bias, 0)]
            for parameter, dim in rows:
                for kept in self.optimizer.state[parameter].values():
                    if isinstance(kept, Tensor) and kept.shape == parameter.shape:
                        kept.index_fill_(dim, units, 0)


class L2Init(Method):
    """Regenerative regularisation: towards the initial weights (Kumar et al. 2023, arXiv:2308.11958)."""

    STRENGTH = 1e-3

    def __init__(self, model: Network, optimizer: Optimizer, generator: torch.Generator) -> None:
        super().__init__(model, optimizer, generator)
        self.initial = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def pull(self) -> None:
        for p, p0 in zip(self.model.parameters(), self.initial, strict=True):
            assert p.grad is not None
            p.grad.add_(p - p0, alpha=2 * self.STRENGTH)


class ShrinkPerturb(Method):
    """Weights shrink and are perturbed at every step (Ash and Adams 2020; so in Dohare et al. 2024)."""

    SHRINK, NOISE = 3e-4, 3e-2

    @torch.no_grad()
    def act(self) -> None:
        for p in self.model.parameters():
            p.mul_(1 - self.SHRINK)
            if p.ndim > 1:
                p.add_(torch.randn(p.shape, generator=self.generator), alpha=self.NOISE / math.sqrt(p[0].numel()))


class ReDo(Method):
    """Units whose mean activation is a small share of the layer's are re-initialised (Sokar et al. 2023)."""

    THRESHOLD, EVERY = 0.0, 10

    @torch.no_grad()
    def act(self) -> None:
        self.steps += 1
        if self.steps % self.EVERY:
            return
        for hidden in self.model.hidden():
            score = hidden.values.abs().mean(0)
            dormant = score <= self.THRESHOLD * score.mean()
            if dormant.any():
                self.reinitialise_(hidden, dormant.nonzero().flatten())


class ContinualBackprop(Method):
    """The least useful mature units go, at a steady rate (Dohare et al. 2024, Nature 632; contribution utility)."""

    RATE, MATURITY, DECAY = 3e-3, 20, 0.99

    def __init__(self, model: Network, optimizer: Optimizer, generator: torch.Generator) -> None:
        super().__init__(model, optimizer, generator)
        self.utility, self.age = ([torch.zeros(n) for n in model.widths] for _ in range(2))
        self.due = [0.0] * len(model.widths)

    @torch.no_grad()
    def act(self) -> None:
        for i, hidden in enumerate(self.model.hidden()):
            self.age[i] += 1
            useful = hidden.values.abs().mean(0) * hidden.last.weight.abs().transpose(0, 1).flatten(1).sum(1)
            self.utility[i].mul_(self.DECAY).add_(useful, alpha=1 - self.DECAY)
            mature = self.age[i] > self.MATURITY
            self.due[i] += self.RATE * int(mature.sum())
            count = min(int(self.due[i]), int(mature.sum()))
            if count:
                self.due[i] -= count
                corrected = self.utility[i] / (1 - self.DECAY ** self.age[i])
                units = torch.where(mature, corrected, torch.inf).argsort()[:count]
                self.reinitialise_(hidden, units)
                self.utility[i][units] = self.age[i][units] = 0


class SelfNormalisedResets(Method):
    """A unit goes when a silence is longer than all but a few of its own (Farias and Jozefiak 2025, arXiv:2410.20098).

    Silences that ended are counted by their length, in steps. Every so often a unit's threshold falls to a percentile
    of its own silences, or doubles where that is not shorter, and the count begins anew, as in the authors' code.
    """

    PERCENTILE, UPDATE, FIRST, LONGEST = 0.99, 1000, 20, 1000

    def __init__(self, model: Network, optimizer: Optimizer, generator: torch.Generator) -> None:
        super().__init__(model, optimizer, generator)
        self.silent = [torch.zeros(n, dtype=torch.long) for n in model.widths]
        self.ended = [torch.zeros(n, self.LONGEST + 1) for n in model.widths]
        self.threshold = [torch.full((n,), self.FIRST) for n in model.widths]

    @torch.no_grad()
    def act(self) -> None:
        self.steps += 1
        for i, hidden in enumerate(self.model.hidden()):
            fires = (hidden.values > 0).any(0)
            self._count(i, fires & (self.silent[i] > 0))
            self.silent[i] = torch.where(fires, 0, self.silent[i] + 1)
            due = self.silent[i] >= self.threshold[i]
            if due.any():
                self._count(i, due)
                self.silent[i][due] = 0
                self.reinitialise_(hidden, due.nonzero().flatten())
            if self.steps % self.UPDATE == 0:
                self._learn(i)

    def _count(self, layer: int, units: Tensor) -> None:
        places = units.nonzero().flatten()
        self.ended[layer][places, self.silent[layer][places].clamp_max(self.LONGEST)] += 1

    def _learn(self, layer: int) -> None:
        ended, threshold = self.ended[layer], self.threshold[layer]
        share = ended.cumsum(1) / ended.sum(1, keepdim=True)  # nan where none ended: then at once
        percentile = (share >= self.PERCENTILE).long().argmax(1)
        shorter = percentile < threshold
        self.threshold[layer] = torch.where(shorter, percentile, 2 * threshold).clamp(1, self.LONGEST)
        ended.zero_()


class Upgd(Optimizer):
    """Utility-based perturbed gradient descent (Elsayed and Mahmood 2024, arXiv:2404.00781), first-order, global.

    Weights of low utility get the whole update with noise; those of the highest are hardly touched.
    """

    def __init__(
        self, params: object, generator: torch.Generator, lr: float = 0.03, noise: float = 1e-3, decay: float = 0.999
    ) -> None:
        super().__init__(params, {"lr": lr, "noise": noise, "decay": decay})  # type: ignore[arg-type]
        self.generator, self.steps = generator, 0

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.steps += 1
        group = self.param_groups[0]
        for p in group["params"]:
            utility = self.state[p].setdefault("utility", torch.zeros_like(p))
            utility.mul_(group["decay"]).add_(-p * p.grad, alpha=1 - group["decay"])
        most = max(float(self.state[p]["utility"].max()) for p in group["params"])
        for p in group["params"]:
            share = torch.sigmoid(self.state[p]["utility"] / (most if most > 0 else 1.0))
            noise = torch.randn(p.shape, generator=self.generator) * group["noise"]
            p.add_((p.grad + noise) * (1 - share), alpha=-2 * group["lr"])
