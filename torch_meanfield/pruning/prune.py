"""``prune_depth_``: blocks go, in place, and with them all that is kept for them anywhere."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_meanfield.convert import convert
from torch_meanfield.convert.example_input import example_for
from torch_meanfield.convert.fold import unconvert_
from torch_meanfield.pruning.averaged import averages_in, follow_given
from torch_meanfield.pruning.batches import Batch, read_batches
from torch_meanfield.pruning.blocks import Block, is_converted, layers_by_name
from torch_meanfield.pruning.carrying_out import Company, Plan, carry_out_, check_plan
from torch_meanfield.pruning.check import Example, outputs_of, with_steps_at_zero
from torch_meanfield.pruning.choice import check_asked, gone_of, needs_order, order_of
from torch_meanfield.pruning.constructor import constructor_of
from torch_meanfield.pruning.latency import fewest_for, seconds_of
from torch_meanfield.pruning.norms import reestimate_norms_
from torch_meanfield.pruning.notes import notes_on
from torch_meanfield.pruning.owners import optimizers_of, schedulers_of
from torch_meanfield.pruning.refusals import check_free
from torch_meanfield.pruning.report import PruneReport
from torch_meanfield.pruning.scores import DepthScores, depth_scores, scorable


def prune_depth_(
    model: nn.Module,
    *,
    remove: int | Collection[str] | None = None,
    keep: int | Collection[str] | None = None,
    to_latency: float | None = None,
    scores: DepthScores | Mapping[str, float] | None = None,
    batches: Iterable[Any] | None = None,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    averages: Any = (),
    schedulers: Any = (),
) -> PruneReport:
    r"""Remove residual blocks from ``model``, in place.

    The blocks that stay move to the first places of their layers, in their order: ``new[i] = old[index[i]]`` with a
    shorter index. Parameters, times, buffers, gradients, optimizer state and averaged copies go along, as in a re-sort;
    the last places are taken out of the model, and out of every optimizer that trains it. So the parameters, and the
    state of an optimizer, are in the order of a network that was made with fewer blocks. Each block keeps its own
    step; the time of a removed one goes with it. The function is then exactly that of the model whose removed blocks
    have step 0.

    What is as it was: ``Parameter`` objects, groups, learning rates, ``initial_lr``. A group whose parameters have all
    gone goes too, in schedulers as well. A model that is not converted is converted first, its times fixed at steps
    of 1; :func:`.fold` gives the plain network in any case. If anything fails, all is as it was.

    Args:
        model: holds mean-field layers, or can be converted.
        remove: how many blocks go, or the names of those that do (as :func:`.depth_scores` has them).
        keep: how many stay, or the names of those.
        to_latency: the share of the present time of a forward pass that is aimed at; blocks go until their measured
            shares add up to the rest.
        scores: in what order they go: what :func:`.depth_scores` returned, or a number for each name, the least first.
            ``None``: greedy scores on ``batches``.
        batches: as for :func:`.depth_scores`. Where they are given, batch norms are re-estimated on them, here and in
            averaged copies (``torch.optim.swa_utils.update_bn``): the best that a removal can be followed by.
        optimizers: only those that are not found by themselves; all that hold a parameter of the model are.
        averages: averaged copies that do not follow the model yet (see :func:`.follow`), or whose model is not known.
        schedulers: those not of ``torch.optim.lr_scheduler``.

    Returns:
        what went, what is called how now, and what has to be made anew.

    Raises:
        TypeError: an argument that is not what it should be.
        ValueError: not one of remove, keep and to_latency; all blocks or none; more than there are; a name that is no
            block; scores of another model; batches that are empty; an optimizer or scheduler that does not train
            the model; a model that is sharded, compiled, replayed as a CUDA graph or inside DDP; one whose own forward
            does not run without the blocks. Nothing has changed then.

    Example:
        >>> from torch_meanfield.models import MeanFieldResNet
        >>> model = MeanFieldResNet(20)
        >>> report = prune_depth_(model, remove=3, scores=depth_scores(model, by="step"))
        >>> report.removed
        ('stage1.particles.0', 'stage1.particles.1', 'stage1.particles.2')
        >>> [len(layer) for layer in model.mean_field_layers().values()]
        [2, 2]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"prune_depth_: model must be a torch.nn.Module, got {type(model).__name__}")
    check_asked(remove, keep, to_latency)
    gc.collect()  # what nobody holds any more (a wrapper, an average, an optimizer) says nothing
    check_free(model)
    read = [] if batches is None else read_batches(batches, model, "prune_depth_")
    trainers = optimizers_of(model, optimizers)
    drivers = schedulers_of(trainers, schedulers)
    with ExitStack() as undo:
        if not is_converted(model):
            _convert_(model, read, undo)
        example = Example.of(model, read)
        gone, seconds = _chosen(model, remove, keep, to_latency, scores, read, example)
        follow_given(model, averages)
        company = Company(trainers, drivers, averages_in(model, averages))
        report = _carried_out(model, Plan.of(model, gone), company, read, example, undo)
        if seconds is not None and example is not None:
            report = replace(report, latency=(seconds, seconds_of(model, example)))
        undo.pop_all()
    return report


def _convert_(model: nn.Module, batches: Sequence[Batch], undo: ExitStack) -> None:
    convert(model, example_for(model, batches[0].few if batches else None, "prune_depth_"))
    undo.callback(unconvert_, model)
    for layer in layers_by_name(model).values():
        if layer.tau_axis.offset is not None:  # nobody asked to train it
            layer.tau_axis.offset.requires_grad_(False)


def _chosen(
    model: nn.Module,
    remove: Any,
    keep: Any,
    to_latency: float | None,
    scores: Any,
    batches: Sequence[Batch],
    example: Example | None,
) -> tuple[list[Block], float | None]:
    """The blocks that go, and the seconds of a forward pass if they were measured."""
    blocks = scorable(model, "prune_depth_")
    if not needs_order(remove, keep, to_latency):
        return gone_of(remove, keep, None, blocks), None
    if scores is None:
        if not batches:
            raise ValueError(
                "prune_depth_: scores is missing, so that it is not known which blocks are to go; pass "
                "depth_scores(model, batches), or batches=, or the names of the blocks"
            )
        scores = depth_scores(model, [(b.inputs, b.targets) for b in batches], progress=False)
    order = order_of(scores, blocks, model)
    if to_latency is None:
        return gone_of(remove, keep, order, blocks), None
    if example is None:
        raise ValueError("prune_depth_: to_latency needs an input to be measured on; pass batches")
    count, seconds = fewest_for(to_latency, model, order, example)
    return gone_of(count, None, order, blocks), seconds


def _carried_out(
    model: nn.Module,
    plan: Plan,
    company: Company,
    batches: Sequence[Batch],
    example: Example | None,
    undo: ExitStack,
) -> PruneReport:
    check_plan(model, plan, company)
    size = _count(model)
    before = None if example is None else with_steps_at_zero(model, plan.slots, example)
    renamed, followed = carry_out_(model, plan, company, undo)
    difference = None if before is None or example is None else _compared(model, before, example, plan)
    averaged = [average.root for average in company.averages]
    norms = sum(reestimate_norms_(m, batches, undo) for m in (model, *averaged) if batches)
    constructor = constructor_of(model)
    return PruneReport(
        removed=tuple(b.name for b in plan.blocks if b.name in plan.gone),
        kept=tuple(b.name for b in plan.blocks if b.name not in plan.gone),
        names=tuple(renamed.get(b.name, b.name) for b in plan.places),
        layers={name: (was, len(plan.slots[name])) for name, was in plan.sizes.items()},
        parameters=(size, _count(model)),
        difference=difference,
        constructor=constructor,
        norms=norms,
        optimizers=followed,
        averages=len(averaged),
        notes=notes_on(model, difference, constructor, norms),
    )


def _compared(model: nn.Module, before: list[Tensor], example: Example, plan: Plan) -> float:
    """Largest relative difference to the outputs ``before``, or an error if the model does not run any more."""
    try:
        after = outputs_of(model, example)
        if [t.shape for t in after] != [t.shape for t in before]:
            raise RuntimeError(f"outputs of shape {[tuple(t.shape) for t in after]}")
    except Exception as error:
        raise ValueError(
            f"prune_depth_: {type(model).__name__} does not run without {', '.join(sorted(plan.gone))} "
            f"({type(error).__name__}: {error}); its forward asks for these modules by name or number"
        ) from error
    one, other = (torch.cat([t.double().reshape(-1) for t in outputs]) for outputs in (before, after))
    if not one.numel():
        return 0.0
    worst, largest = float((one - other).abs().max()), float(one.abs().max())  # nan if an output is
    return worst / largest if largest else worst


def _count(model: nn.Module) -> int:
    taus = {id(p) for layer in layers_by_name(model).values() for p in layer.tau_axis.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in taus)
