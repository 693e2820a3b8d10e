"""``report MODEL``: what ``convert`` and ``find_populations`` see."""

from __future__ import annotations

from argparse import Namespace
from copy import deepcopy
from typing import Any

from torch_meanfield.command_line.errors import Refused, one_line
from torch_meanfield.command_line.model import model_and_example
from torch_meanfield.convert import conversion_report, convert
from torch_meanfield.convert.report import ConversionReport
from torch_meanfield.width.search.find import Report, find_populations

HELP = "what convert and find_populations see in MODEL"


def run(args: Namespace) -> tuple[str, dict[str, Any]]:
    """Text and document.

    Raises:
        Refused: there is neither a stage nor a population.
    """
    model, example = model_and_example(args)
    converted: ConversionReport | str
    populations: Report | str
    try:
        converted = conversion_report(convert(deepcopy(model), example))
    except ValueError as error:
        converted = str(error)
    try:
        populations = find_populations(model, example)
    except ValueError as error:
        populations = str(error)
    if isinstance(converted, str) and (isinstance(populations, str) or not populations.populations):
        found = one_line(ValueError(converted))
        refused = populations if isinstance(populations, str) else "no population of hidden units was found"
        raise Refused(f"{found}; {one_line(ValueError(refused))}")
    document = {"model": type(model).__name__, "stages": _stages(converted), "populations": _populations(populations)}
    return f"{converted}\n{populations}", document


def _stages(report: ConversionReport | str) -> dict[str, Any]:
    if isinstance(report, str):
        return {"found": [], "fixed": [], "error": report}
    found = [
        {"name": s.name, "particles": s.particles, "branches": s.branches, "foldable": s.foldable}
        for s in report.stages
    ]
    return {"found": found, "fixed": [{"name": f.name, "reason": f.reason} for f in report.fixed], "error": None}


def _populations(report: Report | str) -> dict[str, Any]:
    if isinstance(report, str):
        return {"found": [], "refused": [], "error": report}
    found = [{"name": p.name, "units": p.size, "columns": len(p.columns)} for p in report.populations]
    return {"found": found, "refused": [{"name": r.name, "reason": r.reason} for r in report.refused], "error": None}
