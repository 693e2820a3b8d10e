"""``fold``: a plain copy of a converted model, each step size made permanent in its branch."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from torch_meanfield._torch import children_of, parameters_of
from torch_meanfield.convert.report import RECORD, ConversionRecord, conversion_report, find_record
from torch_meanfield.convert.sites import descend, detach, site_of
from torch_meanfield.convert.stage import ConvertedStage, stages_of
from torch_meanfield.depth.euler import scaled_by
from torch_meanfield.observe import run, tensors_in, undisturbed

Model = TypeVar("Model", bound=nn.Module)


def fold(model: Model, example_input: Any = None) -> Model:
    """A deep copy of a converted model without tau, whose parameters hold the steps: a plain model again.

    Its classes and ``state_dict()`` keys are those of the unconverted model, so the checkpoint loads with
    ``strict=True`` where this library is not installed. Each step is multiplied in float32 (float64 in a double
    model) and rounded once to the parameter's dtype. ``conversion_report(folded).fold_error`` is the measured
    difference of the outputs in ``eval()``.

    Args:
        model: what :func:`torch_meanfield.convert` returned, trained or not. It stays as it is.
        example_input: what to measure the error on; ``None``: what the model was converted with.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it is not converted, is folded already, or has a branch that cannot be folded (named).

    Example:
        >>> from torch_meanfield import conversion_report, convert
        >>> from torch_meanfield.convert.small_network import residual_network
        >>> model = convert(residual_network(), torch.randn(2, 4))
        >>> _ = conversion_report(model).stages[0].module.set_tau_([0.5, 1.5, 4.0])
        >>> plain = fold(model)
        >>> plain.state_dict().keys() == residual_network().state_dict().keys()
        True
    """
    owner, record = find_record(model, "fold")
    report = conversion_report(model)
    if report.fold_error is not None:
        raise ValueError("fold: model is folded already; fold the converted model it came from")
    refused = [s.name for s in report.stages if not s.foldable]
    if refused:
        raise ValueError(
            f"fold: the branches of {refused} were converted with foldable=False and cannot be folded; train and "
            f"save the converted model, or convert without foldable=False, which leaves these blocks as they are"
        )
    _check_plain(model)
    folded = deepcopy(model)
    _fold_(folded)
    error = fold_error(
        owner, find_record(folded, "fold")[0], record.example if example_input is None else example_input
    )
    target = find_record(folded, "fold")[0]
    plain = replace(record.report, fold_error=error)
    target.__dict__[RECORD] = ConversionRecord(plain, record.example)
    return folded


def _check_plain(model: nn.Module) -> None:
    """See that every step acts on a layer that is plainly the one that was converted."""
    for stage in stages_of(model).values():
        stage.check_held_()
    for name, module in model.named_modules():
        site = site_of(module)
        if site is not None and site.acts and not (site.under is None and site.place.takes(module)):
            raise ValueError(
                f"fold: {name} is no longer plainly the {site.place.kind.__name__} that was converted (a "
                f"{type(module).__name__} now, or its weights are computed), so it cannot take the step; undo that "
                f"(merge_and_unload(), prune.remove, parametrize.remove_parametrizations), then fold"
            )


@torch.no_grad()
def _fold_(model: nn.Module) -> None:
    for module in list(model.modules()):
        site = site_of(module)
        if site is None:
            continue
        for path, name, by in site.factors(site.stage.step(site.place.slot)):
            parameter = parameters_of(descend(module, path))[name]
            assert parameter is not None
            parameter.copy_(scaled_by(parameter, by))
    _release_(model)
    _clear_caches(model)


def unconvert_(model: nn.Module) -> None:
    """Undo :func:`.convert` of a model whose steps are all 1: what it added goes, and nothing is multiplied."""
    _release_(model)
    for module in model.modules():
        module.__dict__.pop(RECORD, None)


def _release_(model: nn.Module) -> None:
    for module in list(model.modules()):
        if site_of(module) is not None:
            detach(module)
    for module in list(model.modules()):
        for name, child in list(children_of(module).items()):
            if isinstance(child, ConvertedStage):
                delattr(module, name)


def _clear_caches(model: nn.Module) -> None:
    """Tables computed from parameters that some models keep in ``eval()`` are thrown away by ``train()``."""
    modes = [(m, m.training) for m in model.modules()]
    model.train().eval()
    for module, training in modes:
        module.training = training


def fold_error(model: nn.Module, folded: nn.Module, example: Any) -> float:
    """Largest difference of the outputs in ``eval()``, relative to the largest output.

    Raises:
        ValueError: a layer that takes a step does not run: both outputs would be those of a network without it.
    """
    if any(p.is_meta for p in model.parameters()):
        return float("nan")
    outputs = []
    scaled = {m: name for name, m in model.named_modules() if (s := site_of(m)) is not None and s.acts}
    for m in (model, folded):
        modes = [(c, c.training) for c in m.modules()]
        watches = [c.register_forward_hook(lambda c, *_: scaled.pop(c, None) and None) for c in scaled]
        try:
            m.eval()
            with undisturbed():
                outputs.append([t for t in tensors_in(run(m, example)) if t.is_floating_point()])
        finally:
            for watch in watches:
                watch.remove()
            for child, training in modes:
                child.training = training
        if scaled:
            raise ValueError(
                f"fold: {next(iter(scaled.values()))} did not run on the example, so the step of its block acts on "
                f"nothing; a forward that goes past it was given to the block; undo that, then fold, or pass "
                f"an example_input that reaches it"
            )
    worst, largest = 0.0, 0.0
    for mine, theirs in zip(*outputs, strict=True):
        worst = max(worst, float((mine.double() - theirs.double()).abs().max()))
        largest = max(largest, float(mine.double().abs().max()))
    return worst / largest if largest else worst
