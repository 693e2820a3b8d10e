"""``find_populations``: labels propose, templates fill in, the numeric proof decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
        example_input: what it is called with: a tensor, a tuple of arguments, or a dict of keywords. A single example
            of the smallest size that the model takes is enough, and fastest.
        seed: of the proof.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it cannot be copied, or gives no finite output on the example.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(p.name, p.size) for p in find_populations(net, torch.randn(1, 3)).populations]
        [('0.weight', 8)]
    """
    prover = Prover(model, example_input, seed=seed)
    search = Search(prover)
    refused: dict[str, Refused] = {}
    for propose in PROPOSALS:
        proposed, rejected = propose(search)
        for r in rejected:
            refused.setdefault(r.name, r)
        for verdict in prover.prove(proposed, literally=False):
            p = verdict.population
            if verdict.reason is None:
                search.found.append(p)
                refused.pop(p.name, None)
            else:
                # What was refused for a reason of its own (the residual stream) keeps that reason.
                refused.setdefault(p.name, Refused(p.name, verdict.reason))
    order = {id(t): i for i, t in enumerate(named_tensors(model).values())}
    search.found.sort(key=lambda p: order[id(p.columns[0].tensors[0])])
    return Report(tuple(search.found), tuple(refused.values()))


@dataclass
class Search:
    """What the proposals know of one another.

    Attributes:
        prover: holds the model and its private copy.
        found: what has been proven so far.
        followed: names of the weights that labels have reached.
        layers: the layers in the order of execution.
    """

    prover: Prover
    found: list[Neurons] = field(default_factory=list)
    followed: set[str] = field(default_factory=set)
    layers: Layers | None = None


Proposal = Callable[[Search], "tuple[list[Neurons], list[Refused]]"]


def by_labels(search: Search, *, free_groups: bool = False) -> tuple[list[Neurons], list[Refused]]:
    """What label propagation proposes beyond what is found."""
    prover = search.prover
    model, example = prover.as_given()
    search.layers = Layers(model)
    ledger = propagate(model, example, free_groups=free_groups, also=search.layers)
    search.followed |= ledger.readers()
    proposed, refused = candidates(ledger, prover.model)
    taken = {(id(c.tensor), c.dim) for p in search.found for c in p.slices(p.columns)}
    return [p for p in proposed if not any((id(c.tensor), c.dim) in taken for c in p.slices(p.columns))], refused


def by_places_in_groups(search: Search) -> tuple[list[Neurons], list[Refused]]:
    """For models with grouped convolutions: what is exchangeable at the same place of every group."""
    grouped = any(_in_groups(m) for m in search.prover.model.modules())
    return (by_labels(search, free_groups=True)[0] if grouped else []), []


def _in_groups(module: nn.Module) -> bool:
    """Whether ``module`` is a grouped convolution, not one for each channel; anything else may be called groups too."""
    groups, channels = getattr(module, "groups", None), getattr(module, "in_channels", None)
    return isinstance(groups, int) and isinstance(channels, int) and 1 < groups < channels


def by_templates(search: Search) -> tuple[list[Neurons], list[Refused]]:
    """Adjacent layers between which labels were lost."""
    if search.layers is None:
        return [], []
    return adjacent_layers(search.layers, search.prover.model, search.found, search.followed), []


PROPOSALS: tuple[Proposal, ...] = (by_labels, by_places_in_groups, by_templates)
