"""The input that a model is traced with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def example_for(model: nn.Module, example_input: Any, caller: str) -> Any:
    """``example_input``, or an input of the size in a timm model's configuration.

    Raises:
        ValueError: there is neither, or the model has no parameters. The message names ``caller``.
    """
    if example_input is not None:
        return example_input
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = config.get("input_size") if hasattr(config, "get") else None
    if size is None:
        raise ValueError(
            f"{caller}: example_input is needed, since {type(model).__name__} has no timm configuration that names its "
            f"input size; pass a tensor such as torch.randn(1, 3, 224, 224)"
        )
    channels, *space = size
    embedding = getattr(model, "patch_embed", None)
    fixed = getattr(embedding, "img_size", None)  # timm: a model built with img_size keeps the default in its config
    if isinstance(fixed, (tuple, list)) and len(fixed) == 2:
        space = list(fixed)
    channels = getattr(model, "in_chans", channels)
    first = next(model.parameters(), None)
    if first is None:
        raise ValueError(
            f"{caller}: {type(model).__name__} has no parameters, so there is nothing to convert; pass the "
            "network itself"
        )
    return noise(torch.Size((1, channels, *space)), first)


def noise(shape: torch.Size, like: Tensor) -> Tensor:
    """Standard normal numbers, the same at each call; torch's own generators are left as they are."""
    generator = torch.Generator().manual_seed(0)
    dtype = like.dtype if like.is_floating_point() else torch.float32
    if like.is_meta:
        return torch.empty(shape, dtype=dtype, device="meta")
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(like.device, dtype)
