"""Parameter groups: tau without weight decay and with a learning rate of its own."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from torch_meanfield.depth.control import layers_of


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, tau_lr_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Two groups for any torch optimizer: all other parameters, and tau.

    Plain ``optimizer(model.parameters(), weight_decay=...)`` is safe too (decay pulls tau towards its placement, not
    towards 0); this is for a learning rate of tau that differs from the weights'.

    Args:
        model: a module that holds mean-field layers.
        lr: learning rate of the weights.
        weight_decay: of the weights; tau gets none.
        tau_lr_scale: learning rate of tau, in units of ``lr``.

    Returns:
        ``[{"params", "lr", "weight_decay"}, {"params", "lr", "weight_decay", "name": "tau"}]``; one group if no layer
        learns its tau.

    Raises:
        ValueError: a rate that is negative or not finite, or a model without mean-field layers.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("tau_lr_scale", tau_lr_scale)):
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            raise ValueError(f"param_groups: {name} must be a finite number >= 0, got {value!r}")
    layers = layers_of(model, "param_groups")
    taus = [layer.tau_axis.offset for layer in layers if layer.tau_axis.offset is not None]
    theirs = {id(p) for p in taus}
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in model.parameters() if id(p) not in theirs],
            "lr": lr,
            "weight_decay": weight_decay,
            "name": "weights",
        }
    ]
    if taus:
        groups.append({"params": taus, "lr": lr * tau_lr_scale, "weight_decay": 0.0, "name": "tau"})
    return groups
