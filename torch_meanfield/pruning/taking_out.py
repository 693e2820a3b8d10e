"""Taking modules out of a model, the numbers of those behind them moved up."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace

from torch import nn

from torch_meanfield._torch import children_of
from torch_meanfield.convert.report import RECORD, ConversionRecord, StageReport
from torch_meanfield.depth import MeanFieldSequential
from torch_meanfield.depth.layer import MeanFieldLayer
from torch_meanfield.models.resnet import Stage

_NUMBERED = re.compile(r"(.*?)(\d+)", flags=re.S)


def take_out_(model: nn.Module, units: Iterable[str], undo: ExitStack) -> dict[str, str]:
    """Take the modules ``units`` out of ``model``, and layers without blocks; returns each new name by the old one.

    Children of one parent that are named by numbers (``0``, ``1``, ...; ``b1``, ``b2``, ...) are counted anew, in
    their order, so that the names are those of a network that was made with fewer.
    """
    old = {id(m): name for name, m in model.named_modules()}
    records = [(m, dict(m.named_modules())) for m in model.modules() if RECORD in m.__dict__]
    by_parent: dict[str, set[str]] = {}
    for unit in units:
        parent, _, name = unit.rpartition(".")
        by_parent.setdefault(parent, set()).add(name)
    for module, names in [(model.get_submodule(p), names) for p, names in by_parent.items()]:
        if not isinstance(module, MeanFieldLayer):  # which has let them go itself
            _without(module, names, undo)
    for module in list(model.modules()):
        for name, child in list(children_of(module).items()):
            if isinstance(child, MeanFieldLayer) and not len(child):
                _remove_layer(module, name, child, undo)
    for owner, before in records:
        _rename_record(owner, before, undo)
    new = {id(m): name for name, m in model.named_modules()}
    return {name: new[i] for i, name in old.items() if i in new}


def _without(parent: nn.Module, names: set[str], undo: ExitStack) -> None:
    children = children_of(parent)
    undo.callback(children.update, dict(children))
    undo.callback(children.clear)
    stems = {m[1] for name in names if (m := _NUMBERED.fullmatch(name))}
    numbers = {
        stem: sorted(int(m[2]) for n in children if (m := _NUMBERED.fullmatch(n)) and m[1] == stem) for stem in stems
    }
    left: dict[str, nn.Module | None] = {}
    for name, child in children.items():
        if name in names:
            continue
        match = _NUMBERED.fullmatch(name)
        left[f"{match[1]}{numbers[match[1]].pop(0)}" if match and match[1] in stems else name] = child
    children.clear()
    children.update(left)


def _remove_layer(parent: nn.Module, name: str, layer: MeanFieldLayer, undo: ExitStack) -> None:
    children = children_of(parent)
    undo.callback(children.update, dict(children))
    undo.callback(children.clear)
    if not isinstance(layer, MeanFieldSequential):
        del children[name]
    else:  # what called it goes on
        children[name] = None if isinstance(parent, Stage) else nn.Identity()


def _rename_record(owner: nn.Module, before: dict[str, nn.Module], undo: ExitStack) -> None:
    """Let the conversion report of ``owner`` name what is left as it is called now."""
    record: ConversionRecord = owner.__dict__[RECORD]
    undo.callback(owner.__dict__.__setitem__, RECORD, record)
    now = {id(m): name for name, m in owner.named_modules()}

    def renamed(name: str) -> str | None:
        return now.get(id(before[name])) if name in before else name

    def stage(report: StageReport) -> StageReport | None:
        name = renamed(report.name)
        if name is None:
            return None
        size = len(owner.get_submodule(name))  # type: ignore[arg-type]
        particles = tuple(tuple(renamed(part) or part for part in parts) for parts in report.particles[:size])
        parameters = []
        for path, power in report.parameters:
            module, _, own = path.rpartition(".")
            theirs = renamed(module)
            parameters += [] if theirs is None else [(f"{theirs}.{own}".lstrip("."), power)]
        return replace(report, name=name, particles=particles, parameters=tuple(parameters))

    stages = tuple(s for s in map(stage, record.report.stages) if s is not None)
    fixed = tuple(replace(f, name=renamed(f.name) or f.name) for f in record.report.fixed)
    owner.__dict__[RECORD] = ConversionRecord(replace(record.report, stages=stages, fixed=fixed), record.example)
