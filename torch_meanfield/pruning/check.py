"""What a model puts out before and after a removal, on the input it was converted with or the first batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_meanfield.convert.report import RECORD, ConversionRecord
from torch_meanfield.depth.shortening import positions_without
from torch_meanfield.observe import map_tensors, run, tensors_in, undisturbed
from torch_meanfield.pruning.batches import Batch
from torch_meanfield.pruning.blocks import layers_by_name


@dataclass(frozen=True)
class Example:
    """An input, and what it is an input of: the model itself, or the converted model inside it."""

    inputs: Any
    path: str = ""

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Batch]) -> Example | None:
        """The first batch, or what ``model`` was converted with; ``None`` if there is neither, or on meta."""
        parameter = next(model.parameters(), None)
        if parameter is None or parameter.is_meta:
            return None
        if batches:
            return cls(batches[0].inputs)
        for name, module in model.named_modules():
            record: ConversionRecord | None = module.__dict__.get(RECORD)
            if record is not None and not any(t.is_meta for t in tensors_in(record.example)):
                like = next(module.parameters(), parameter)

                def here(t: Tensor, like: Tensor = like) -> Tensor:
                    return t.to(like.device, like.dtype if t.is_floating_point() else t.dtype)

                return cls(map_tensors(here, record.example), name)
        return None


def outputs_of(model: nn.Module, example: Example) -> list[Tensor]:
    """The floating outputs in ``eval()``."""
    module = model.get_submodule(example.path)
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.train().eval()  # clears tables that some models keep in eval()
        with undisturbed():
            return [t.clone() for t in tensors_in(run(module, example.inputs)) if t.is_floating_point()]
    finally:
        module.train().eval()
        for m, training in modes:
            m.training = training


@torch.no_grad()
def with_steps_at_zero(model: nn.Module, kept: Mapping[str, Sequence[int]], example: Example) -> list[Tensor]:
    """The outputs when the blocks that are not in ``kept`` (slots by layer) have step 0; the model is as it was."""
    anchors = []
    for name, layer in layers_by_name(model).items():
        axis, stay = layer.tau_axis, list(kept[name])
        tau = axis.read()
        there = positions_without(tau, stay)
        zeroed = torch.zeros_like(tau)
        zeroed[stay] = there
        zeroed = zeroed.cummax(0).values  # a block that goes stands where the one before it does
        anchors.append((axis, axis.anchor.clone(), axis.unit_steps))
        axis.anchor.copy_(axis.anchor + (zeroed - tau))
        axis.unit_steps = False
    try:
        return outputs_of(model, example)
    finally:
        for axis, anchor, unit_steps in anchors:
            axis.anchor.copy_(anchor)
            axis.unit_steps = unit_steps
