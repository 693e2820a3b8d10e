"""A timm backbone with its blocks converted, as a network of the benchmarks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.errors import BadInput
from recipes.finetune.model import Backbone as Timm
from torch_meanfield import convert

SIDE = 28  # pixels to which images of 14 x 14 are enlarged


class Backbone(nn.Module):
    """``name`` of timm on grey images given as rows; its residual blocks and their neurons are populations.

    Args:
        classes: numbers in an output.
        name: as ``timm.create_model`` knows it.
        weights: a file with a state dict to begin from; of a classifier of another shape nothing is taken.

    Raises:
        BadInput: an unknown name, or a file without weights of this model.
    """

    def __init__(self, classes: int, name: str, weights: Path | None = None) -> None:
        super().__init__()
        model = Timm(name, classes, 3, SIDE).create()
        if weights is not None:
            self._fill(model, name, weights)
        self.model = convert(model, torch.zeros(1, 3, SIDE, SIDE))

    @staticmethod
    def _fill(model: nn.Module, name: str, weights: Path) -> None:
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
            raise BadInput(f"--weights {weights}: no state dict can be read ({error}); pass one of {name}") from error
        own = model.state_dict()
        fit = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
        missing = [k for k in own if k not in fit and not k.startswith(model.default_cfg["classifier"])]  # type: ignore[index]
        if missing:
            raise BadInput(f"--weights {weights}: it lacks {missing[0]!r} and {len(missing) - 1} more of {name}")
        model.load_state_dict(fit, strict=False)

    def forward(self, x: Tensor) -> Tensor:
        side = round(x.shape[1] ** 0.5)
        images = F.interpolate(x.view(len(x), 1, side, side), size=SIDE, mode="nearest")
        return self.model(images.expand(-1, 3, -1, -1))
