"""``verify``: prove that populations are exchangeable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from torch_meanfield.particles.neurons import Neurons
from torch_meanfield.width.search.find import find_populations
from torch_meanfield.width.search.prover import Prover, Verdict


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
        seed: Seed of the random parameters and permutations.

    Returns:
        one :class:`Verdict` for each population, in order.

    Raises:
        TypeError: ``model`` is not a module, or a population is not :class:`Neurons`.
        ValueError: a model that cannot be copied or gives no finite output; a population of another model, or one
            without incoming columns.

    Example:
        >>> from torch_meanfield.particles.neurons import neurons_from
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> hidden = neurons_from([(net[0].weight, 0), (net[0].bias, 0), (net[2].weight, 1)], "hidden")
        >>> verify(net, torch.randn(4, 3), [hidden])[0].proven
        True
        >>> verify(net, torch.randn(4, 3), [neurons_from([(net[0].weight, 0), (net[2].weight, 1)])])[0].proven
        False
    """
    if populations is None:
        populations = find_populations(model, example_input, seed=seed).populations
    for i, p in enumerate(populations):
        if not isinstance(p, Neurons):
            raise TypeError(
                f"verify: populations[{i}] must be Neurons, got {type(p).__name__}; neurons_from() makes one of a "
                f"list of slices"
            )
    prover = Prover(model, example_input, seed=seed)
    return prover.prove([p if p.owner is not None else Neurons(p.columns, p.roles, model, p.name) for p in populations])
