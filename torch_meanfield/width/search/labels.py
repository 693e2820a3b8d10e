"""The ledger of labels: which entries of which activations belong to which entry of which parameter.

Every entry along every dimension of every parameter and buffer has a label, an integer of at least 1. While the model
runs, activations carry the labels of the units that made them as *tracks*, and operations that force two entries to
be permuted together unite their labels. What is united at the end is one unit.

A track is an int64 tensor with as many dimensions as its activation and size 1 in each dimension along which it does
not vary, so most operations touch a few hundred integers where the activation has a million numbers. 0 means no label.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from torch_meanfield.particles.population import named_tensors

Tracks = tuple[Tensor, ...]
INPUT = 1  # the bit of the model's input in ``State.history``
OUTPUT = "is an output of the model"


@dataclass(frozen=True)
class State:
    """What is known about one activation (or parameter).

    Attributes:
        tracks: its labels; more than one where several dimensions carry units (a transposed token mixer).
        sources: bit set of the layer calls whose output channels these are.
        history: bit set of all layer calls it was computed through, with :data:`INPUT` for the model's input.
    """

    tracks: Tracks = ()
    sources: int = 0
    history: int = 0


NOTHING = State()
_LOW = (1 << 32) - 1


def compact(track: Tensor) -> Tensor:
    """Narrow each dimension along which ``track`` does not vary to size 1."""
    for d in range(track.ndim):
        if track.shape[d] > 1 and (track.stride(d) == 0 or not _varies_along(track, d)):
            track = track.narrow(d, 0, 1)
    return track


def _varies_along(track: Tensor, dim: int) -> bool:
    if not track.numel():
        return False
    # Where it varies, the first line along ``dim`` mostly shows it, and the whole need not be compared.
    line = track[tuple(slice(None) if d == dim else 0 for d in range(track.ndim))]
    return bool((line != line[0]).any()) or not bool((track == track.narrow(dim, 0, 1)).all())


def varying(track: Tensor) -> set[int]:
    """The dimensions along which a compact track varies."""
    return {d for d, size in enumerate(track.shape) if size > 1}


class Ledger:
    """Labels, what unites them, and what happened to them.

    Args:
        model: its parameters and floating-point buffers are labelled; the rest is not.
        free_groups: the unit of a grouped convolution is the place within each group, instead of the group.
    """

    def __init__(self, model: nn.Module, *, free_groups: bool = False) -> None:
        self.free_groups = free_groups
        self.tensors = {n: t for n, t in named_tensors(model).items() if t.is_floating_point() and t.ndim}
        self._names = {id(t): n for n, t in reversed(self.tensors.items())}
        self.starts: dict[tuple[str, int], int] = {}
        self.count = 1
        self.pairs: list[Tensor] = []
        self.emitted: list[Tensor] = []
        self.consumed: list[Tensor] = []
        self.stream: list[tuple[int, int]] = []  # of each residual addition, how many pairs were known before and after
        self.frozen: list[tuple[Tensor, str]] = []
        self.layers = 0
        self._states: WeakIdKeyDictionary = WeakIdKeyDictionary()

    # -- states ------------------------------------------------------------------------------------------------

    def state(self, tensor: object) -> State:
        """What is known about ``tensor``; a parameter is labelled when it is first met."""
        if not isinstance(tensor, Tensor):
            return NOTHING
        if tensor in self._states:
            known: State = self._states[tensor]
            return known
        name = self._names.get(id(tensor))
        if name is None:
            return NOTHING
        state = State(tuple(self._label(name, tensor, d) for d in range(tensor.ndim) if tensor.shape[d] > 1))
        self._states[tensor] = state
        return state

    def put(self, tensor: Tensor, state: State) -> None:
        """Remember ``state`` for ``tensor``. Parameters keep the labels they have."""
        if id(tensor) not in self._names:
            self._states[tensor] = state

    def is_parameter(self, tensor: object) -> bool:
        """Whether ``tensor`` is a labelled parameter or buffer itself, not something computed."""
        return id(tensor) in self._names

    def _label(self, name: str, tensor: Tensor, dim: int) -> Tensor:
        size = int(tensor.shape[dim])
        start = self.starts.setdefault((name, dim), self.count)
        if start == self.count:
            self.count += size
        shape = [1] * tensor.ndim
        shape[dim] = size
        return torch.arange(start, start + size, device="cpu").view(shape)

    def new_layer(self) -> int:
        """A bit for one more call of a layer."""
        self.layers += 1
        return INPUT << self.layers

    # -- what happens to labels --------------------------------------------------------------------------------

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Entries at the same place are permuted together (broadcasting; places without a label say nothing)."""
        self.pairs.append(pairs_of(a, b))

    def collapse(self, track: Tensor, dims: Iterable[int]) -> Tensor:
        """Unite the labels of ``track`` along ``dims``; return the compact track of one representative each."""
        dims = sorted(set(dims) & varying(track))
        if not dims:
            return track
        big = torch.iinfo(torch.int64).max
        least = track.masked_fill(track == 0, big).amin(dims, keepdim=True)
        least = least.masked_fill(least == big, 0)
        self.unite(track, least)
        return compact(least)

    def freeze(self, track: Tensor, reason: str) -> None:
        """These labels cannot be followed any further: no population holds them."""
        self.frozen.append((torch.unique(track), reason))

    def readers(self) -> set[str]:
        """The tensors that labelled channels were read with."""
        labels = set(torch.unique(torch.cat(self.consumed)).tolist()) if self.consumed else set()
        return {name for (name, _), start in self.starts.items() if start in labels}

    def classes(self) -> Tensor:
        """For each label (0 included) the smallest label it is united with."""
        return united(self.pairs, self.count)

    def streams(self) -> set[int]:
        """The classes of units that are residual streams.

        A stream is what an addition unites with its branch. What a product has united before is a hidden width (the
        skip around the scan of a Mamba block).
        """
        classes = self.classes()
        found: set[int] = set()
        for known, until in self.stream:
            a, b = torch.cat(self.pairs[known:until], dim=1)
            if not found.issuperset(torch.unique(classes[a]).tolist()):
                before = united(self.pairs[:known], self.count)
                found |= set(classes[a[before[a] != before[b]]].tolist())
        return found


def united(pairs: list[Tensor], count: int) -> Tensor:
    """For each of ``0..count - 1`` the smallest that ``pairs``, each of shape ``(2, k)``, unite it with."""
    parent = torch.arange(count, device="cpu")
    a, b = torch.cat(pairs, dim=1) if pairs else (parent, parent)
    while True:  # each round hangs every root below the smallest neighbour and then flattens the trees
        ra, rb = parent[a], parent[b]
        if torch.equal(ra, rb):
            return parent
        low, high = torch.minimum(ra, rb), torch.maximum(ra, rb)
        parent.scatter_reduce_(0, high, low, "amin")
        while not torch.equal(flat := parent[parent], parent):
            parent = flat


def pairs_of(a: Tensor, b: Tensor) -> Tensor:
    """The distinct pairs of labels at the same places, ``(2, k)``, without the places that have no label."""
    # Neighbours are mostly equal: without their repetitions little is left to be sorted.
    code = torch.unique_consecutive(((a << 32) | b).flatten())
    code = torch.unique(code[(code >> 32 != 0) & (code & _LOW != 0)])
    return torch.stack([code >> 32, code & _LOW])
