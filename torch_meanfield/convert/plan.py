"""What of a model can be converted, and why the rest cannot: the stages, planned on a private copy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from torch_meanfield.convert.blocks import Block, chains, find_blocks, is_in
from torch_meanfield.convert.description import Reads, counts, difference, ignored, places_apart, reads_recorded
from torch_meanfield.convert.handed import describe_handed
from torch_meanfield.convert.loops import loop_runs
from torch_meanfield.convert.report import FixedBlock
from torch_meanfield.convert.segments import segments
from torch_meanfield.convert.trace import ForwardGraph, trace
from torch_meanfield.convert.trial import BlockInputs, Trial
from torch_meanfield.observe import left_out, private_copy

Patterns = str | Sequence[str]


@dataclass
class StagePlan:
    """Blocks that will be the particles of one stage.

    Attributes:
        particles: the blocks by slot.
        host: qualified name of the module that the stage will be registered in.
        checked: whether exchange and scaling were proven with numbers.
    """

    particles: list[list[Block]]
    host: str
    checked: bool

    @property
    def around(self) -> str:
        """Qualified name, inside the host, of the module that holds the blocks; empty if that is the host itself."""
        names = [b.name.split(".")[:-1] for particle in self.particles for b in particle]
        common = os.path.commonprefix(names)[len(self.host.split(".")) if self.host else 0 :]
        return ".".join(common)


@dataclass
class ConversionPlan:
    """What a conversion would do."""

    stages: list[StagePlan] = field(default_factory=list)
    fixed: list[FixedBlock] = field(default_factory=list)


def plan_conversion(
    model: nn.Module,
    example: Any,
    *,
    include: Patterns = "*",
    exclude: Patterns = (),
    ignore: Patterns = (),
    foldable: bool = True,
) -> ConversionPlan:
    """Plan a conversion; arguments as in :func:`torch_meanfield.convert`. ``model`` is not touched."""
    ignore = _patterns(ignore, "ignore")
    copy = private_copy(model, share_parameters=True)
    try:
        with reads_recorded(copy) as reads:
            graph = trace(copy, example)
        copy.train().eval()  # clears tables cached in eval mode: they are no configuration
    except Exception as error:
        raise ValueError(
            f"convert: {type(model).__name__} does not run on the example_input ({type(error).__name__}: {error}); "
            f"pass one that it takes{left_out(model)}"
        ) from error
    on_meta = any(p.is_meta for p in model.parameters())
    taken: list[str] = []
    modules: dict[str, nn.Module] = dict(copy.named_modules())
    # named_modules() of the search itself reads _modules, never these
    iterating = {n for n, m in modules.items() if _is_container(m) or reads[id(m)] & {"children", "named_children"}}
    plan = ConversionPlan()
    seen: dict[str, Block] = {}
    blocks = _blocks(copy, graph, reads, nested=False, foldable=foldable)
    loops = loop_runs(copy, graph, reads, foldable=foldable)
    looks: list[Callable[[], list[list[Block]]]] = [
        lambda: chains(blocks),
        lambda: chains(_blocks(copy, graph, reads, nested=True, foldable=foldable)),
        lambda: loops,
    ]
    names = {b.name for run in (blocks, *loops) for b in run}
    chosen = _selected(names, include, exclude)
    for look in looks:
        runs = look()
        new = [run for run in runs if any(b.name not in seen for b in run)]
        for run in new:
            free = [b for b in run if not any(b.meets(t) for t in taken)]
            for part in _unbroken(run, free):
                for particles in _stages(part, chosen, copy, example, ignore, numbers=not on_meta):
                    _fill_tables(particles, ignore)
                    plan.stages.append(StagePlan(particles, _host(particles, modules, iterating), not on_meta))
                    taken += [p for particle in particles for b in particle for p in b.parts]
        seen = {b.name: b for run in runs for b in run} | seen
    plan.stages.sort(key=lambda s: seen[s.particles[0][0].name].call.start)
    plan.fixed = _fixed(list(seen.values()), taken, iterating)
    return plan


def _blocks(copy: nn.Module, graph: ForwardGraph, reads: Reads, *, nested: bool, foldable: bool) -> list[Block]:
    blocks = find_blocks(copy, graph, reads, nested=nested, foldable=foldable)
    describe_handed(blocks, graph, dict(copy.named_modules()))
    return blocks


def _fill_tables(particles: list[list[Block]], ignore: Sequence[str]) -> None:
    """Note which attributes travel: those that differ from place to place and are not ignored."""
    for blocks in zip(*particles, strict=True):
        for key in blocks[0].carried:
            table = tuple(b.description[key].value for b in blocks)
            if len(set(table)) > 1 and not ignored(key, ignore):
                for b in blocks:
                    b.tables[key] = table


def _unbroken(run: list[Block], free: list[Block]) -> list[list[Block]]:
    """The parts of ``run`` between the blocks that are no longer free."""
    parts: list[list[Block]] = [[]]
    for block in run:
        if block in free:
            parts[-1].append(block)
        elif parts[-1]:
            parts.append([])
    return [p for p in parts if p]


def _selected(names: Iterable[str], include: Patterns, exclude: Patterns) -> Callable[[str], bool]:
    def matcher(patterns: Patterns, argument: str) -> Callable[[str], bool]:
        patterns = _patterns(patterns, argument)
        for pattern in patterns:
            if pattern != "*" and not any(_matches(n, pattern) for n in names):
                raise ValueError(
                    f"convert: {argument} pattern {pattern!r} matches no residual block; the blocks are {sorted(names)}"
                )
        return lambda name: any(_matches(name, p) for p in patterns)

    included, excluded = matcher(include, "include"), matcher(exclude, "exclude")
    return lambda name: included(name) and not excluded(name)


def _patterns(patterns: Patterns, argument: str) -> Sequence[str]:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"convert: {argument} must be a pattern or several, got {patterns!r}")
    return patterns


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def _stages(
    run: list[Block],
    chosen: Callable[[str], bool],
    copy: nn.Module,
    example: Any,
    ignore: Sequence[str],
    *,
    numbers: bool,
) -> list[list[list[Block]]]:
    """The particles of each stage in one run of blocks; blocks that are in none get the reason."""
    for block in run:
        if block.reason is None and not chosen(block.name):
            block.reason = "left out by include and exclude"
    kept = [block.carried for block in run]
    for block in run:  # constants travel only where the run has no particles without that
        block.carried = {}
    labels = _labels(run, ignore, numbers=numbers)
    if not segments(labels):
        for block, carried in zip(run, kept, strict=True):
            block.carried = carried
        labels = _labels(run, ignore, numbers=numbers)
    if numbers:
        labels = _proven(run, labels, copy, example, ignore)
    found = segments(labels)
    inside = set()
    for start, period, repeats in found:
        inside |= set(range(start, start + period * repeats))
    for i, block in enumerate(run):
        if i not in inside and block.reason is None:
            block.reason = _unlike_neighbours(i, run, ignore, numbers=numbers)
    return [[run[s + k * p : s + (k + 1) * p] for k in range(repeats)] for s, p, repeats in found]


def _labels(run: list[Block], ignore: Sequence[str], *, numbers: bool) -> list[int | None]:
    """Equal numbers for blocks that nothing known of them forbids to change places."""
    labels: list[int | None] = []
    first: list[Block] = []
    for block in run:
        label = None
        if block.reason is None:
            alike = (i for i, b in enumerate(first) if _difference(b, block, ignore, numbers=numbers) is None)
            label = next(alike, None)
            if label is None:
                label = len(first)
                first.append(block)
        labels.append(label)
    return labels


def _difference(one: Block, other: Block, ignore: Sequence[str], *, numbers: bool) -> str | None:
    places = places_apart(one.name, other.name) if numbers else None
    both = one.carried.keys() & other.carried.keys()
    carried = {k for k in both if [s.path for s in one.carried[k]] == [s.path for s in other.carried[k]]}
    return difference(one.description, other.description, other.name, places=places, ignore=ignore, carried=carried)


def _proven(
    run: list[Block], labels: list[int | None], copy: nn.Module, example: Any, ignore: Sequence[str]
) -> list[int | None]:
    """Labels after the numeric tests: ``None`` also for blocks that differ in function, or that do not scale."""
    if not segments(labels):
        return labels
    modules = dict(copy.named_modules())
    of_label: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        if label is not None:
            of_label.setdefault(label, []).append(i)
    several = [members for members in of_label.values() if len(members) > 1]
    inputs = BlockInputs(copy, example, [part for members in several for part in run[members[0]].parts])
    for members in several:
        block = run[members[0]]
        try:
            trials = [Trial(block, part, modules[part], inputs.by_name[part]) for part in block.parts]
            reason = trials[-1].scales()
        except Exception as error:
            reason = f"its test in double precision failed ({type(error).__name__}: {error})"
        for i in members:
            if reason is not None:
                run[i].reason, run[i].scaled, labels[i] = reason, [], None
            elif i != members[0]:
                counting = _counting(block, run[i])
                pairs = zip(trials, run[i].parts, strict=True)
                equal = [k for k in block.carried if block.description[k] != run[i].description.get(k)]
                tried = (t.same_function(modules[p], ignore, equal, training=bool(counting)) for t, p in pairs)
                unlike = next((reason for reason in tried if reason is not None), None)
                for key in equal if unlike is None else ():
                    unlike = unlike or trials[-1].makes_up(key, run[i].description[key].value)
                if unlike is not None:
                    because = f"; {counting[0]!r} differs between them" if counting else ""
                    run[i].reason, labels[i] = f"it is not exchangeable with {block.name}: {unlike}{because}", None
    return labels


def _counting(one: Block, other: Block) -> list[str]:
    """The attributes that count the blocks."""
    places = places_apart(one.name, other.name)
    return [key for key in one.description if counts(one.description[key], other.description.get(key), places)]


def _unlike_neighbours(i: int, run: list[Block], ignore: Sequence[str], *, numbers: bool) -> str:
    block = run[i]
    for j in (i - 1, i + 1):
        if 0 <= j < len(run):
            words = _difference(block, run[j], ignore, numbers=numbers)
            if words is not None:
                return f"it cannot change places with {run[j].name}: {words}"
    return "no block of its kind stands next to it"


def _fixed(blocks: list[Block], taken: list[str], iterating: set[str]) -> list[FixedBlock]:
    """The outermost residual blocks that have nothing to do with a particle, without those that merely hold others."""
    fixed: list[FixedBlock] = []
    for block in sorted(blocks, key=lambda b: (b.call.start, -b.call.end)):
        if any(block.meets(t) for t in taken):
            continue
        if any(is_in(block.name, f.name) for f in fixed):
            continue
        inner = [b for b in blocks if b is not block and is_in(b.name, block.name)]
        if inner and (block.name in iterating or (block.reason is None or "of its kind" in block.reason)):
            continue  # what is said of the blocks inside says more
        reason = block.reason or "no block of its kind stands next to it"
        fixed.append(FixedBlock(block.name, reason, len(block.branches), block.foldable and bool(block.scaled)))
    return fixed


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


def _host(particles: list[list[Block]], modules: dict[str, nn.Module], iterating: set[str]) -> str:
    """Name of the module that the stage is registered in: the nearest one around the blocks that does not iterate.

    A module that runs over its children would call the stage, too. Where all modules around the blocks do (networks
    that are one ``nn.Sequential``, timm's feature extractors), it is the first module inside the first block that does
    not.
    """
    first = particles[0][0].name
    name = first
    while name:
        name, _, _ = name.rpartition(".")
        if name not in iterating:
            return name
    return next(n for n in modules if is_in(n, first) and n not in iterating)
