"""``find_populations``: labels propose, templates fill in, the numeric proof decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from torch_meanfield.particles.neurons import Neurons
from torch_meanfield.particles.population import named_tensors
from torch_meanfield.width.search.adjacent import Layers, adjacent_layers
from torch_meanfield.width.search.candidates import Refused, candidates
from torch_meanfield.width.search.follow import propagate
from torch_meanfield.width.search.prover import Prover


@dataclass(frozen=True)
class Report:
    """What :func:`find_populations` found; iterating gives the populations.

    Attributes:
        populations: proven ones, in the order of execution.
        refused: candidates that are no population, each with a name and a reason.
    """

    populations: tuple[Neurons, ...]
    refused: tuple[Refused, ...]

    def __iter__(self) -> Iterator[Neurons]:
        return iter(self.populations)

    def __len__(self) -> int:
        return len(self.populations)

    def __str__(self) -> str:
        lines = [f"{len(self.populations)} populations, {len(self.refused)} candidates refused"]
        lines += [f"  {p.name}: {p.size} units, {len(p.columns)} columns" for p in self.populations]
        lines += [f"  refused {r}" for r in self.refused]
        return "\n".join(lines)


def find_populations(model: nn.Module, example_input: Any, *, seed: int = 0) -> Report:
    """Every population of hidden units that can be found and proven exchangeable.

    Found by watching one eager forward pass: the units that a layer puts out are followed through shape operations,
    norms, activations, gates, depthwise and grouped convolutions and attention to the layers that read them. The
    residual stream is never a population. Only what the proof of :func:`torch_meanfield.width.verify` accepts is
    reported as found.

    Args:
        model: any module; left exactly as it is (parameters, buffers, mode, random state, hooks).
        example_input: what it is called with: a tensor, a tuple of arguments, a dict of keywords, or for both
            ``inspect.signature(model.forward).bind(x, mask=mask)``. A single example of the smallest size that the
            model takes is enough, and fastest.
        seed: Seed of the proof.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it cannot be copied, or gives no finite output on the example.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(p.name, p.size) for p in find_populations(net, torch.randn(1, 3)).populations]
        [('0.weight', 8)]
    """
    search = Search(Prover(model, example_input, seed=seed))
    search.by_labels()
    if any(_in_groups(m) for m in model.modules()):  # what is exchangeable at the same place of every group
        search.by_labels(free_groups=True)
    search.by_templates()
    order = {id(t): i for i, t in enumerate(named_tensors(model).values())}
    search.found.sort(key=lambda p: order[id(p.columns[0].tensors[0])])
    return Report(tuple(search.found), tuple(search.refused.values()))


def _in_groups(module: nn.Module) -> bool:
    """Whether ``module`` is a grouped convolution, not one for each channel; anything else may be called groups too."""
    groups, channels = getattr(module, "groups", None), getattr(module, "in_channels", None)
    return isinstance(groups, int) and isinstance(channels, int) and 1 < groups < channels


class Search:
    """Populations found so far, and what was refused; each method proposes more, and the prover decides."""

    def __init__(self, prover: Prover) -> None:
        self.prover = prover
        self.found: list[Neurons] = []
        self.refused: dict[str, Refused] = {}
        self.followed: set[str] = set()  # names of the weights that labels have reached
        self.layers = Layers(prover.model)  # in the order of execution

    def by_labels(self, *, free_groups: bool = False) -> None:
        """What label propagation proposes beyond what is found."""
        model, example = self.prover.as_given()
        self.layers = Layers(model)
        ledger = propagate(model, example, free_groups=free_groups, also=self.layers)
        self.followed |= ledger.readers()
        proposed, refused = candidates(ledger, self.prover.model)
        for r in () if free_groups else refused:
            self.refused.setdefault(r.name, r)
        taken = {(id(c.tensor), c.dim) for p in self.found for c in p.slices(p.columns)}
        self._prove([p for p in proposed if not any((id(c.tensor), c.dim) in taken for c in p.slices(p.columns))])

    def by_templates(self) -> None:
        """Adjacent layers between which labels were lost."""
        self._prove(adjacent_layers(self.layers, self.prover.model, self.found, self.followed))

    def _prove(self, proposed: list[Neurons]) -> None:
        for verdict in self.prover.prove(proposed, literally=False):
            p = verdict.population
            if verdict.reason is None:
                self.found.append(p)
                self.refused.pop(p.name, None)
            else:  # what was refused for a reason of its own (the residual stream) keeps that reason
                self.refused.setdefault(p.name, Refused(p.name, verdict.reason))
