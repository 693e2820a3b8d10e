"""Residual blocks in the graph of a forward pass, and the parameters that scale each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from torch_meanfield.convert.description import Attribute, Description, Reads, describe
from torch_meanfield.convert.residual import Addition, additions, nested_additions, origin
from torch_meanfield.convert.scaling import NotScalable, absorbing, last_affines, powers
from torch_meanfield.convert.trace import ForwardGraph, ModuleCall, Value


@dataclass(eq=False)
class Scaled:
    """One parameter that takes a power of the step.

    Attributes:
        site: qualified name, inside the block, of the module during whose forward pass the parameter is scaled.
        owner, name: the parameter inside the block; both empty where the output of ``site`` is scaled instead.
        power: 1 or -1.
        whole: whether multiplying what ``site`` puts out is the same.
    """

    site: str
    owner: str
    name: str
    power: int
    whole: bool = False

    @property
    def path(self) -> str:
        """Qualified name of the parameter inside the block."""
        return f"{self.owner}.{self.name}" if self.owner else self.name


@dataclass(eq=False)
class Block:
    """One residual block of a model.

    Attributes:
        name: qualified; of a block in a loop, the module that puts out the branch.
        call: the module's one call in the forward pass; of a block in a loop, what runs from one state of the stream
            to the next.
        branches: its residual additions.
        scaled: the parameters that take the step; empty if ``reason`` is given.
        description: what must be equal in blocks that change places.
        reason: why it cannot become a particle; ``None`` if it can.
        foldable: whether parameters take the step.
        carried: for each attribute that is a factor in the block, the parameters that can make up for another value.
        tables: of those that differ in its stage, the value at each place (:mod:`.carried`).
        skipped: which of its additions are part of the stream, since all blocks share what they add.
        before: in a loop, the modules that the branch runs through before (:mod:`.loops`).
        output: in a loop, which of the tensors that the module puts out is the branch; ``None``: its output holds the
            sum already.
    """

    name: str
    call: ModuleCall
    branches: list[Addition]
    scaled: list[Scaled] = field(default_factory=list)
    description: Description = field(default_factory=dict)
    reason: str | None = None
    foldable: bool = True
    carried: dict[str, list[Scaled]] = field(default_factory=dict)
    tables: dict[str, tuple[float, ...]] = field(default_factory=dict)
    skipped: frozenset[int] = frozenset()
    before: tuple[str, ...] = ()
    output: int | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the modules that are the block."""
        return (*self.before, self.name)

    def meets(self, name: str) -> bool:
        """Whether the module ``name`` is a part of the block, lies in one, or holds one."""
        return any(is_in(part, name) or is_in(name, part) for part in self.parts)


def is_in(name: str, other: str) -> bool:
    """Whether the module ``name`` is ``other`` or lies inside it."""
    return name == other or name.startswith(f"{other}.")


def find_blocks(
    model: nn.Module, graph: ForwardGraph, reads: Reads, *, nested: bool, foldable: bool = True
) -> list[Block]:
    """Every residual block of ``model`` in the order of execution, also blocks within blocks.

    Args:
        model: the private copy that ran.
        graph: the graph of its forward pass.
        reads: the attributes that were read in it.
        nested: whether to take modules, too, that keep their input's shape and merely hold residual additions.
        foldable: whether to take only branches that parameters scale; else a module's output may take the step.
    """
    times = Counter(call.name for call in graph.calls)
    modules = dict(model.named_modules())
    found = []
    for call in graph.calls:
        if not call.name:
            continue
        branches = additions(call)
        if nested and not branches and _keeps_shape(call):
            branches = nested_additions(call, graph.nodes)
        module = modules[call.name]
        if not branches or not any(True for _ in module.parameters()):
            continue
        block = Block(call.name, call, branches, description=describe(module, reads))
        block.description["what it is called with"] = call.literals
        if times[call.name] > 1:
            block.reason = f"it is called {times[call.name]} times in one forward pass"
        else:
            block.reason = shared(block.parts, model)
        scale_block(block, graph, modules, foldable=foldable)
        found.append(block)
    return found


def _keeps_shape(call: ModuleCall) -> bool:
    return bool(call.inputs and call.outputs) and call.inputs[0].shape == call.outputs[0].shape


def scale_block(block: Block, graph: ForwardGraph, modules: dict[str, nn.Module], *, foldable: bool) -> None:
    """Find what takes the step of ``block``, unless there is a reason against it already; the reason if nothing can."""
    if block.reason is not None:
        return
    common = {p for part in block.parts for p in common_to_all(part, modules[""])}
    if common:  # what such a layer adds is part of the stream
        theirs = [i for i, a in enumerate(block.branches) if _all_common(a.branch, common, modules)]
        block.skipped = frozenset(theirs) if len(theirs) < len(block.branches) else frozenset()
        block.branches = [a for i, a in enumerate(block.branches) if i not in block.skipped]
    try:
        block.scaled = _scaled_parameters(graph, block.call, block.branches, modules)
    except NotScalable as error:
        block.foldable = False
        block.scaled = [] if foldable else _scaled_outputs(block.call, block.branches)
        block.reason = None if block.scaled else str(error)
    block.description |= {f"step on {s.path or s.site}": (s.site, s.power) for s in block.scaled}
    block.carried = _carried(block, graph, modules)


def _all_common(branch: Value, common: set[int], modules: dict[str, nn.Module]) -> bool:
    try:
        names = [v.name for v in last_affines(branch)]
    except NotScalable:
        return False
    return all(id(modules[""].get_parameter(name)) in common for name in names)


def _carried(block: Block, graph: ForwardGraph, modules: dict[str, nn.Module]) -> dict[str, list[Scaled]]:
    """For each attribute by which the block multiplies, the parameters that can make up for another value of it."""
    factors = {k: v.value for k, v in block.description.items() if isinstance(v, Attribute) and type(v.value) is float}
    found: dict[str, list[Scaled]] = {}
    span = range(block.call.start, block.call.end)
    for key, value in factors.items() if block.output is None else ():
        owner = f"{block.name}.{key}".rpartition(".")[0]
        nodes = [n for n in graph.nodes[span.start : span.stop] if n.module == owner and n.name in ("mul", "multiply")]
        nodes = [n for n in nodes if any(type(a) is float and a == value for a in n.args)]
        try:
            values = [v for n in nodes[:1] for v in absorbing(graph, span, n)] if len(nodes) == 1 else []
        except NotScalable:
            continue
        if values and all(v.name.startswith(f"{block.name}.") for v in values):
            found[key] = [_scaled(v, -1, block.call, graph, modules) for v in values]
    return found


def shared(parts: Sequence[str], model: nn.Module) -> str | None:
    """Why modules of these names cannot be a particle: a parameter of theirs is another's too."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    for part in parts:
        common = common_to_all(part, model)
        for own, p in model.get_submodule(part).named_parameters():
            for other in names[id(p)] if id(p) not in common else ():
                if not any(other.startswith(f"{name}.") for name in parts):
                    return f"it shares its parameter {own!r} with {other!r}; a particle must own its tensors"
    return None


def common_to_all(name: str, model: nn.Module) -> set[int]:
    """The ``id`` of each parameter that every block beside ``name`` holds at the same place: it belongs to no particle.

    In CoaT all blocks of a stage hold one convolution that encodes positions.
    """
    module, (parent, _, _) = model.get_submodule(name), name.rpartition(".")
    beside = [m for m in model.get_submodule(parent).children() if type(m) is type(module)]
    if len(beside) < 2:
        return set()
    theirs = [dict(m.named_parameters()) for m in beside]
    return {id(p) for own, p in module.named_parameters() if all(t.get(own) is p for t in theirs)}


def _scaled_parameters(
    graph: ForwardGraph, call: ModuleCall, branches: list[Addition], modules: dict[str, nn.Module]
) -> list[Scaled]:
    span = range(call.start, call.end)
    result, degree = powers(graph, span, [a.branch for a in branches], [v for a in branches for v in a.node.outputs])
    if any(degree.get(v, 0) for v in call.outputs):
        raise NotScalable("what it puts out beside the stream would be scaled too")
    prefix = f"{call.name}."
    scaled = []
    for value, power in result.items():
        if not value.name.startswith(prefix):
            raise NotScalable(f"its last affine layer {value.name!r} is not inside the block")
        if any(not span.start <= node.index < span.stop for node in graph.readers[value]):
            raise NotScalable(f"its last affine layer {value.name!r} is read outside of the block")
        entry = _scaled(value, power, call, graph, modules)
        site = entry.site
        inside = [c for c in _inside(call) if c.name == f"{prefix}{site}".rstrip(".")]
        ends = [[degree.get(v, 0) for v in values] for c in inside for values in (c.inputs, c.outputs)]
        entry.whole = bool(ends) and not any(sum(ends[::2], [])) and all(out == [1] for out in ends[1::2])
        scaled.append(entry)
    order = {name: i for i, (name, _) in enumerate(modules[call.name].named_parameters())}
    return sorted(scaled, key=lambda s: order.get(s.path, 0))


def _scaled(value: Value, power: int, call: ModuleCall, graph: ForwardGraph, modules: dict[str, nn.Module]) -> Scaled:
    owner, _, name = value.name[len(call.name) + 1 :].rpartition(".")
    return Scaled(_scaling_module(graph, value, call.name, owner, modules), owner, name, power)


def _scaled_outputs(call: ModuleCall, branches: list[Addition]) -> list[Scaled]:
    """For each branch the module inside the block that puts it out; nothing if one has none."""
    scaled = []
    for addition in branches:
        source = origin(addition.branch)
        names = [c.name for c in _inside(call) if [origin(v) for v in c.outputs] == [source]]
        if not names:
            return []
        scaled.append(Scaled(names[0][len(call.name) + 1 :], "", "", 1))
    return scaled if len({s.site for s in scaled}) == len(scaled) else []


def _inside(call: ModuleCall) -> list[ModuleCall]:
    return [c for child in call.children for c in (child, *_inside(child))]


def _scaling_module(graph: ForwardGraph, value: Value, block: str, owner: str, modules: dict[str, nn.Module]) -> str:
    """The innermost module of the block that holds the parameter and was executing whenever it was read."""
    site = owner.split(".") if owner else []
    for node in graph.readers[value]:
        inside = node.module[len(block) + 1 :] if node.module != block else ""
        parts = inside.split(".") if inside else []
        common = 0
        while common < min(len(site), len(parts)) and site[common] == parts[common]:
            common += 1
        site = site[:common]
    # PyTorch's own encoder layer may hand all its weights to one fused kernel, past the modules that hold them.
    for depth in range(len(site) + 1):
        name = ".".join([block, *site[:depth]])
        if isinstance(modules[name], (nn.TransformerEncoderLayer, nn.MultiheadAttention)):
            return ".".join(site[:depth])
    return ".".join(site)


def chains(blocks: list[Block]) -> list[list[Block]]:
    """Runs of sibling blocks, each reading what the one before it put out; the innermost first."""
    siblings: dict[str, list[Block]] = {}
    for block in blocks:
        siblings.setdefault(block.name.rpartition(".")[0], []).append(block)
    runs = []
    for family in siblings.values():
        run: list[Block] = []
        for block in family:
            if run and not _follows(block, run[-1]):
                runs.append(run)
                run = []
            run.append(block)
        runs.append(run)
    return sorted(runs, key=lambda run: -run[0].name.count("."))


def _follows(block: Block, previous: Block) -> bool:
    outputs = {origin(v) for v in previous.call.outputs}
    return any(origin(v) in outputs for v in block.call.inputs)
