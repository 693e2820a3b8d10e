"""What is compared: the network as it is, with learned steps, and with what might explain their effect."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torch_meanfield import conversion_report, convert, param_groups

WEIGHT_DECAY = 1e-4


@dataclass(frozen=True)
class Arm:
    """One side of the comparison.

    Attributes:
        name: How tables name it.
        form: ``plain``; ``converted``: steps that are differences of ordered times; ``scaled``: a learned factor for
            each of the same branches, without order; ``layerscale``: one for each of their channels (Touvron et al.
            2021), from 1; ``last``: a factor for the last of these branches alone.
        factor_rate: Learning rate of times or factors over that of the weights.
        warmup: Share of the steps in which the rate rises.
        clip: Largest norm of the gradient; ``None``: not clipped.
    """

    name: str
    form: Literal["plain", "converted", "scaled", "layerscale", "last"] = "plain"
    factor_rate: float = 1.0
    warmup: float = 0.0
    clip: float | None = None

    def applied(self, model: nn.Module, example: Tensor) -> nn.Module:
        """``model`` in the form of this arm, changed in place; it computes what it did."""
        if self.form == "converted":
            return convert(model, example)
        if self.form != "plain":
            names = scaled_modules(model, example)
            for name in names[-1:] if self.form == "last" else names:
                parent, _, last = name.rpartition(".")
                branch_end = model.get_submodule(name)
                channels = branch_end.num_features if self.form == "layerscale" else 1
                setattr(model.get_submodule(parent), last, Scaled(branch_end, channels))
        return model

    def groups(self, model: nn.Module, rate: float) -> list[dict[str, Any]]:
        """Parameter groups: weights with weight decay, times or factors without."""
        if self.form == "converted":
            return param_groups(model, rate, WEIGHT_DECAY, self.factor_rate)
        factors = [m.factor for m in model.modules() if isinstance(m, Scaled)]
        theirs = {id(p) for p in factors}
        weights = [p for p in model.parameters() if id(p) not in theirs]
        groups: list[dict[str, Any]] = [{"params": weights, "lr": rate, "weight_decay": WEIGHT_DECAY}]
        if factors:
            groups.append({"params": factors, "lr": rate * self.factor_rate, "weight_decay": 0.0})
        return groups


ARMS = {
    a.name: a
    for a in (
        Arm("plain"),
        Arm("converted", "converted"),
        Arm("scale, no order", "scaled"),
        Arm("converted, tau x3", "converted", 3.0),
        Arm("converted, tau x10", "converted", 10.0),
        Arm("converted, tau x0.3", "converted", 0.3),
        Arm("scale, x3", "scaled", 3.0),
        Arm("scale, last block alone", "last"),
        Arm("LayerScale", "layerscale"),
        Arm("plain, warm-up", warmup=0.1),
        Arm("plain, clipped", clip=1.0),
    )
}


class Scaled(nn.Module):
    """A learned factor, 1 at first, on what a normalisation puts out: it multiplies its gain and bias.

    So do the steps of a converted network, and both keep the precision of the parameters under autocast.

    Args:
        module: The normalisation at the end of a residual branch.
        channels: 1 for a single factor, or their number for one each.
    """

    def __init__(self, module: nn.Module, channels: int = 1) -> None:
        super().__init__()
        self.module = module
        self.factor = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scaled = {name: p * self.factor for name, p in self.module.named_parameters()}
        return cast(Tensor, functional_call(self.module, scaled, (x,)))


def scaled_modules(model: nn.Module, example: Tensor) -> list[str]:
    """Names of the modules whose parameters would take the steps if ``model`` were converted."""
    report = conversion_report(convert(deepcopy(model), example))
    named = [name for stage in report.stages for name, power in stage.parameters if power == 1]
    return list(dict.fromkeys(name.rpartition(".")[0] for name in named))
