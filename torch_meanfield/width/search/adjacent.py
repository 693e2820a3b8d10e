"""Templates: what is probably a population where labels were lost on the way.

A kernel inside a custom ``autograd.Function`` is invisible to the observer, and some operations cannot be followed.
Where one layer runs right after another that makes as many channels as it reads, the two (with the norms between them)
are proposed; the proof decides.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from torch_meanfield.observe import Call
from torch_meanfield.observe.functions import NORMS
from torch_meanfield.particles import Slice
from torch_meanfield.particles.neurons import Neurons
from torch_meanfield.particles.population import named_tensors

_LAYERS = ("linear", "conv1d", "conv2d", "conv3d")


@dataclass
class _Layer:
    """One call of a layer, and what came after it before the next one."""

    weight: str
    bias: str | None
    grouped: bool
    own: list[str] = field(default_factory=list)


class Layers:
    """A watcher, for :func:`torch_meanfield.observe.observe`, that lists layers in order of execution."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(t): n for n, t in named_tensors(model).items()}
        self.calls: list[_Layer] = []

    def __call__(self, call: Call) -> None:
        if call.name in _LAYERS:
            weight = self.names.get(id(call.arg(1, "weight")))
            if weight is not None:
                grouped = call.name != "linear" and int(call.arg(6, "groups", 1)) > 1
                self.calls.append(_Layer(weight, self.names.get(id(call.arg(2, "bias"))), grouped))
        elif call.name in NORMS and self.calls:
            vectors = [t for t in (*call.args[1:], *call.kwargs.values()) if isinstance(t, Tensor)]
            self.calls[-1].own.extend(self.names[id(t)] for t in vectors if id(t) in self.names)


def adjacent_layers(
    layers: Layers, model: nn.Module, found: Sequence[Neurons], followed: Collection[str] = ()
) -> list[Neurons]:
    """For each layer that runs right after one that makes as many channels as it reads: the population between them.

    Args:
        layers: what was seen of ``model`` or a copy of it.
        model: the owner of what is proposed.
        found: proven already; nothing that they own is proposed again.
        followed: names of the weights that labels have reached; nothing is proposed for these.
    """
    tensors = named_tensors(model)
    taken = {(id(c.tensor), c.dim) for p in found for c in p.slices(p.columns)}
    runs = [layer.weight for layer in layers.calls]
    proposed = []
    for made, read in zip(layers.calls, layers.calls[1:], strict=False):
        if read.weight in followed or made.grouped or read.grouped:
            continue
        if runs.count(made.weight) > 1 or runs.count(read.weight) > 1:
            continue
        w_in, w_out = tensors[made.weight], tensors[read.weight]
        n, read_n = int(w_in.shape[0]), int(w_out.shape[1])
        if n < 2 or read_n % n or (id(w_in), 0) in taken or (id(w_out), 1) in taken:
            continue
        columns = [Slice(w_in, 0), Slice(w_out, 1, inner=read_n // n)]
        roles = ["in", "out"]
        if made.bias is not None:
            columns.append(Slice(tensors[made.bias], 0))
            roles.append("in")
        own = [tensors[name] for name in dict.fromkeys(made.own) if tensors[name].shape == (n,)]
        columns += [Slice(t, 0) for t in own]
        roles += ["own"] * len(own)
        proposed.append(Neurons(columns, roles, owner=model, name=made.weight))
    return proposed
