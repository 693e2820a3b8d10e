"""The call that makes the plain network of a depth, for a timm model that was made with arguments of its own.

:func:`torch_meanfield.pruning.prune_depth_` finds it from the model alone where the name and what the model keeps tell
enough; here the arguments of the recipe's command line are known as well.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from recipes.finetune.model import Backbone
from torch_meanfield.pruning import PruneReport
from torch_meanfield.pruning.constructor import on_meta
from torch_meanfield.pruning.report import Constructor


def constructor_with(backbone: Backbone, report: PruneReport, folded: nn.Module) -> PruneReport:
    """``report`` with a constructor, if one of the backbone's own arguments counts its blocks and makes ``folded``.

    A call counts if it makes the entries of ``folded``, of the same shapes.
    """
    import timm

    if report.constructor is not None:
        return report
    wanted = {k: v.shape for k, v in folded.state_dict().items()}
    for kwargs, size in itertools.product(_shorter(backbone.kwargs, report), ({}, {"img_size": backbone.side})):
        given = {"num_classes": backbone.num_classes, "in_chans": backbone.in_chans, **size, **kwargs}
        try:
            made = on_meta(partial(timm.create_model, backbone.name, **given))
        except Exception:  # what a timm model raises for arguments it cannot take is its own choice
            continue
        if {k: v.shape for k, v in made.state_dict().items()} == wanted:
            words = ", ".join([repr(backbone.name), *(f"{k}={v!r}" for k, v in given.items())])
            build = Constructor(f"timm.create_model({words})", partial(timm.create_model, backbone.name, **given))
            return replace(report, constructor=build)
    return report


def _shorter(kwargs: dict[str, Any], report: PruneReport) -> Iterator[dict[str, Any]]:
    """The arguments with smaller numbers of blocks: one for each stage, counted from 0 or 1, or one for all."""
    lost = {name: was - now for name, (was, now) in report.layers.items()}
    for name, value in kwargs.items():
        if isinstance(value, int) and not isinstance(value, bool):
            yield {**kwargs, name: value - sum(lost.values())}
        if not isinstance(value, (list, tuple)):
            continue
        for first in (0, 1):
            numbers = list(value)
            for layer, count in lost.items():
                at = re.search(r"\d+", layer)
                if at and 0 <= int(at[0]) - first < len(numbers) and isinstance(numbers[int(at[0]) - first], int):
                    numbers[int(at[0]) - first] -= count
            yield {**kwargs, name: type(value)(numbers)}
