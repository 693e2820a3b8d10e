"""``convert``: the residual blocks of an existing model become particles, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from torch_meanfield.convert.blocks import Block, chains, find_blocks
from torch_meanfield.convert.description import difference, reads_recorded
from torch_meanfield.convert.example import example_for
from torch_meanfield.convert.report import RECORD, ConversionReport, FixedBlock, Record, StageReport
from torch_meanfield.convert.segments import segments
from torch_meanfield.convert.sites import Site, attach, detach, site_of
from torch_meanfield.convert.stage import ConvertedStage, stages_of
from torch_meanfield.convert.trace import trace
from torch_meanfield.convert.trial import Inputs, Trial, make_sites
from torch_meanfield.depth.tau_axis import check_horizon
from torch_meanfield.observe import fake_quantiser, private_copy

Model = TypeVar("Model", bound=nn.Module)
Patterns = str | Sequence[str]


def convert(
    model: Model,
    example_input: Any = None,
    *,
    horizon: float | None = None,
    include: Patterns = "*",
    exclude: Patterns = (),
    foldable: bool = True,
) -> Model:
    r"""Give the residual blocks of ``model`` learnable times, in place.

    .. math:: X^{l} = X^{l-1} + (\tau^l - \tau^{l-1})\, f(X^{l-1}, \theta^l)

    Runs of blocks that can change places become the particles of a stage (:class:`.ConvertedStage`), each with one
    step size for all its residual branches. The step multiplies the branch's last affine layer while that runs, so at
    step 1 (``horizon=None``) outputs and gradients keep every bit. Names, containers, ``forward`` and the entries of
    ``state_dict()`` stay; the entries of tau are added. Checkpoints of the unconverted model load with
    ``strict=True``. After each optimizer step the blocks are re-sorted with their optimizer state, see
    :func:`torch_meanfield.resort_`.

    Found by watching one forward pass of a private copy that shares the parameters, then proven with numbers, block by
    block, in double precision on random weights (not on the meta device). What is in doubt stays as it is;
    :func:`conversion_report` says why.

    Args:
        model: any module that runs eagerly, whatever its attribute names.
        example_input: what it is called with: a tensor, a tuple of arguments, or a dict of keywords, at the working
            resolution. ``None``: a timm model's configured input size.
        horizon: the last time T of each stage; its steps begin at T over its number of particles. ``None``: that
            number, so that every step is exactly 1.
        include, exclude: shell patterns (``fnmatch``), one or several, for the qualified names of blocks or of modules
            that hold them: ``"layer3"``, ``"blocks.*"``.
        foldable: ``False`` also converts branches that no parameter scales (an activation other than ReLU stands
            behind the last affine layer): the output of the branch's last module is multiplied at run time, and
            :func:`torch_meanfield.fold` refuses.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: nothing in it can be converted (with the reasons), it is converted already, a pattern matches
            no block, a horizon that is not positive, or no example. The model is untouched then.

    Source: Lu et al. 2020, eq. (15) and Algorithm 1; the scaled layer is the fold of section 3 of the theory notes.

    Example:
        >>> from torch_meanfield import conversion_report, convert
        >>> from torch_meanfield.convert.examples import residual_network
        >>> model = convert(residual_network(), torch.randn(2, 4))
        >>> print(conversion_report(model))
        ResidualNetwork: 1 stages, 3 particles, 3 branches
          mean_field_blocks: 3 particles, blocks.0 to blocks.2, 1 residual branch in each
    """
    _check_unconverted(model)
    check_horizon(horizon, 1)
    example = example_for(model, example_input, "convert")
    plan = find_stages(model, example, include=include, exclude=exclude, foldable=foldable)
    if not plan.stages:
        reasons = "".join(f"\n  {f}" for f in plan.fixed) or "\n  no module adds a branch to its own input"
        raise ValueError(f"convert: {type(model).__name__} has no residual blocks that can change places:{reasons}")
    _apply(model, plan, horizon, example)
    return model


@dataclass
class StagePlan:
    """Blocks that will be the particles of one stage, by slot."""

    particles: list[list[Block]]
    checked: bool

    @property
    def name(self) -> str:
        """Where the blocks are."""
        return self.particles[0][0].name.rpartition(".")[0]


@dataclass
class Plan:
    """What a conversion would do."""

    iterating: set[str] = field(default_factory=set)  # modules whose forward runs over their children
    stages: list[StagePlan] = field(default_factory=list)
    fixed: list[FixedBlock] = field(default_factory=list)


def find_stages(
    model: nn.Module, example: Any, *, include: Patterns = "*", exclude: Patterns = (), foldable: bool = True
) -> Plan:
    """Plan a conversion; ``model`` is not touched."""
    copy = private_copy(model, share_parameters=True)
    try:
        with reads_recorded(copy) as reads:
            record = trace(copy, example)
        copy.train().eval()  # clears tables cached in eval mode: they are no configuration
    except Exception as error:
        raise ValueError(
            f"convert: {type(model).__name__} does not run on the example_input ({type(error).__name__}: {error}); "
            f"pass one that it takes"
        ) from error
    on_meta = any(p.is_meta for p in model.parameters())
    taken: list[str] = []
    # named_modules() of the search itself reads _modules, never these
    plan = Plan(
        {n for n, m in copy.named_modules() if _is_container(m) or reads[id(m)] & {"children", "named_children"}}
    )
    seen: dict[str, Block] = {}
    for nested in (False, True):
        blocks = find_blocks(copy, record, reads, nested=nested, foldable=foldable)
        chosen = _selected(blocks, include, exclude, checked=not nested)
        new = {b.name for b in blocks} - set(seen)
        for run in chains(blocks):
            free = [b for b in run if not any(_nested(b.name, t) or _nested(t, b.name) for t in taken)]
            if nested and not any(b.name in new for b in run):
                continue
            for part in _unbroken(run, free):
                for stage in _stages(part, chosen, copy, example, numbers=not on_meta):
                    plan.stages.append(stage)
                    taken += [b.name for particle in stage.particles for b in particle]
        seen = {b.name: b for b in blocks} | seen
    start = {name: b.call.start for name, b in seen.items()}
    plan.stages.sort(key=lambda s: start[s.particles[0][0].name])
    plan.fixed = _fixed(list(seen.values()), taken, plan.iterating)
    return plan


def _nested(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.")


def _unbroken(run: list[Block], free: list[Block]) -> list[list[Block]]:
    parts: list[list[Block]] = [[]]
    for block in run:
        if block in free:
            parts[-1].append(block)
        elif parts[-1]:
            parts.append([])
    return [p for p in parts if p]


def _selected(blocks: Iterable[Block], include: Patterns, exclude: Patterns, *, checked: bool) -> Callable[[str], bool]:
    names = {b.name for b in blocks}

    def matcher(patterns: Patterns, argument: str) -> Callable[[str], bool]:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
            raise TypeError(f"convert: {argument} must be a pattern or several, got {patterns!r}")
        for pattern in patterns:
            if checked and pattern != "*" and not any(_matches(n, pattern) for n in names):
                raise ValueError(
                    f"convert: {argument} pattern {pattern!r} matches no residual block; the blocks are {sorted(names)}"
                )
        return lambda name: any(_matches(name, p) for p in patterns)

    included, excluded = matcher(include, "include"), matcher(exclude, "exclude")
    return lambda name: included(name) and not excluded(name)


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def _stages(
    run: list[Block], chosen: Callable[[str], bool], copy: nn.Module, example: Any, *, numbers: bool
) -> list[StagePlan]:
    """The stages in one run of blocks; reasons are left on the blocks that are in none."""
    labels: list[int | None] = []
    first: list[Block] = []
    for block in run:
        label = None
        if block.reason is None and not chosen(block.name):
            block.reason = "left out by include and exclude"
        if block.reason is None:
            alike = (i for i, b in enumerate(first) if not difference(block.description, b.description))
            label = next(alike, None)
            if label is None:
                label = len(first)
                first.append(block)
        labels.append(label)
    if numbers:
        labels = _proven(run, labels, copy, example)
    found = segments(labels)
    inside = set()
    for start, period, repeats in found:
        inside |= set(range(start, start + period * repeats))
    for i, block in enumerate(run):
        if i not in inside and block.reason is None:
            block.reason = _unlike_neighbours(i, run)
    return [StagePlan([run[s + k * p : s + (k + 1) * p] for k in range(repeats)], numbers) for s, p, repeats in found]


def _proven(run: list[Block], labels: list[int | None], copy: nn.Module, example: Any) -> list[int | None]:
    """Labels after the numeric tests: blocks that differ in function get another, those that do not scale none."""
    if not segments(labels):
        return labels
    modules = dict(copy.named_modules())
    of_label: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        if label is not None:
            of_label.setdefault(label, []).append(i)
    several = {label: places for label, places in of_label.items() if len(places) > 1}
    inputs = Inputs(copy, example, [run[places[0]].name for places in several.values()])
    fresh = len(of_label)
    for places in several.values():
        block = run[places[0]]
        try:
            trial = Trial(block, modules[block.name], inputs.by_name[block.name])
            reason = trial.scales()
        except Exception as error:
            reason = f"its test in double precision failed ({type(error).__name__}: {error})"
        for i in places:
            if reason is not None:
                run[i].reason, run[i].scaled, labels[i] = reason, [], None
            elif i != places[0]:
                unlike = trial.same_function(modules[run[i].name])
                if unlike is not None:
                    labels[i] = fresh
                    run[i].reason = f"it is not exchangeable with {block.name}: {unlike}"
                    labels[i] = None
    return labels


def _unlike_neighbours(i: int, run: list[Block]) -> str:
    block = run[i]
    for j in (i - 1, i + 1):
        if 0 <= j < len(run):
            words = difference(block.description, run[j].description, run[j].name)
            if words is not None:
                return f"it cannot change places with {run[j].name}: {words}"
    return "no block of its kind stands next to it"


def _fixed(blocks: list[Block], taken: list[str], groups: set[str]) -> list[FixedBlock]:
    """Of the residual blocks that are not inside, around or among the particles, the outermost; no mere containers."""
    fixed: list[FixedBlock] = []
    for block in sorted(blocks, key=lambda b: (b.call.start, -b.call.end)):
        if any(_nested(block.name, t) or _nested(t, block.name) for t in taken):
            continue
        if any(_nested(block.name, f.name) for f in fixed):
            continue
        inner = [b for b in blocks if b is not block and _nested(b.name, block.name)]
        if inner and (block.name in groups or (block.reason is None or "of its kind" in block.reason)):
            continue  # what is said of the blocks inside says more
        reason = block.reason or "no block of its kind stands next to it"
        fixed.append(FixedBlock(block.name, reason, len(block.branches), block.foldable and bool(block.scaled)))
    return fixed


def _check_unconverted(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    names = list(stages_of(model)) + [n for n, m in model.named_modules() if site_of(m) is not None]
    if names:
        raise ValueError(
            f"convert: {type(model).__name__} is converted already (at {names[0]!r}); fold(model) gives a plain copy"
        )
    quantiser = fake_quantiser(model)
    if quantiser is not None:
        raise ValueError(
            f"convert: {type(model).__name__} rounds by a fake quantiser, {quantiser}, which computes in single "
            f"precision; what is converted is proven in double. Convert and train before quantisation-aware training, "
            f"then fold(model)"
        )


def _apply(model: nn.Module, plan: Plan, horizon: float | None, example: Any) -> None:
    """Make the stages; if anything fails, undo what was done."""
    modules = dict(model.named_modules())
    stages: list[tuple[nn.Module, str, ConvertedStage]] = []
    done: list[nn.Module] = []
    reports = []
    try:
        for p in plan.stages:
            blocks = [[modules[b.name] for b in particle] for particle in p.particles]
            stage = ConvertedStage(blocks, check_horizon(horizon, len(blocks)))
            stage.train(model.training)
            host = _host(p.particles, modules, plan.iterating)
            name = _free_name(modules[host], p.name[len(host) :].lstrip(".") if host else p.name)
            modules[host].add_module(name, stage)
            stages.append((modules[host], name, stage))
            sites: dict[nn.Module, Site] = {}
            for slot, particle in enumerate(p.particles):
                for b in particle:
                    sites |= make_sites(b, modules[b.name], stage, slot)
            for module, site in sites.items():
                attach(module, site)
                done.append(module)
            reports.append(_report(p, f"{host}.{name}".lstrip(".")))
        report = ConversionReport(type(model).__name__, tuple(reports), tuple(plan.fixed))
        model.__dict__[RECORD] = Record(report, example)
    except BaseException:
        for module in done:
            detach(module)
        for owner, name, _ in stages:
            del owner._modules[name]
        raise


def _report(plan: StagePlan, name: str) -> StageReport:
    blocks = [b for particle in plan.particles for b in particle]
    return StageReport(
        name=name,
        particles=tuple(tuple(b.name for b in particle) for particle in plan.particles),
        branches=sum(len(b.branches) for b in plan.particles[0]),
        parameters=tuple((f"{b.name}.{s.path}", s.power) for b in blocks for s in b.scaled if s.name),
        foldable=all(b.foldable for b in blocks),
        checked=plan.checked,
    )


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


def _host(particles: list[list[Block]], modules: dict[str, nn.Module], iterating: set[str]) -> str:
    """Name of the module that the stage is registered in: the nearest around the blocks that is no container.

    A container calls its children one after the other. Where all modules around the blocks do (networks that are one
    ``nn.Sequential``, timm's feature extractors), it is the first module inside the first block that does not.
    """
    first = particles[0][0].name
    name = first
    while name:
        name = name.rpartition(".")[0]
        if name not in iterating:
            return name
    return next(n for n in modules if _nested(n, first) and n not in iterating)


def _free_name(host: nn.Module, around: str) -> str:
    name = "mean_field_" + (around.replace(".", "_") or "blocks")
    while hasattr(host, name):
        name += "_"
    return name
