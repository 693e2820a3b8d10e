"""The end of a fine-tuning: a plain timm checkpoint, proven by loading it into plain timm."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes.finetune.model import Backbone
from torch_meanfield import conversion_report, fold

# Largest difference of logits, in units of the largest logit.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
ROUNDED = 5e-2  # of a model whose weights themselves are in 16 bits: every folded weight is rounded once more


class NotTheSame(RuntimeError):
    """The plain checkpoint does not compute what the trained model computes."""


@torch.no_grad()
def export(net: nn.Module, backbone: Backbone, images: Tensor, path: Path | None) -> dict[str, Any]:
    """Write the weights of a trained model, folded if it is converted, for untouched ``timm.create_model``.

    The bytes to be written are loaded (``weights_only=True``, ``strict=True``) into a newly made plain model, and the
    outputs of both compared in ``eval()`` on the CPU; the file appears only if they agree.

    Args:
        net: Trained, plain or converted; it stays as it is.
        backbone: What makes the plain model.
        images: To compare on, normalised, shape ``(N, C, H, W)``.
        path: The file; ``None`` to prove without writing.

    Returns:
        ``file`` (name or ``None``), ``error`` (largest difference of the logits over the largest logit), and
        ``folded``.

    Raises:
        NotTheSame: The outputs differ by more than the tolerance. Nothing is written then.
        OSError: The file cannot be written; what was there before stays.
    """
    folded = _is_converted(net)
    weights = fold(net).state_dict() if folded else net.state_dict()
    weights = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in weights.items()}
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    buffer.seek(0)
    plain = backbone.create()
    dtype = next(net.parameters()).dtype
    plain.to(dtype).load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    images = images.to("cpu", dtype)
    expected, got = _logits(net, images), _logits(plain, images)
    error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not error <= TOLERANCE.get(dtype, ROUNDED):
        raise NotTheSame(
            f"the plain {backbone.name} with the {'folded' if folded else 'trained'} weights differs from the trained "
            f"model: relative error {error:.1e}, above {TOLERANCE.get(dtype, ROUNDED):.0e}; nothing written"
        )
    if path is not None:
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_bytes(buffer.getvalue())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return {"file": path and path.name, "error": error, "folded": folded}


def _is_converted(net: nn.Module) -> bool:
    try:
        conversion_report(net)
    except ValueError:
        return False
    return True


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    modes = [(m, m.training) for m in model.modules()]
    device = next(model.parameters()).device
    try:
        return model.to("cpu").eval()(images).double()
    finally:
        model.to(device)
        for module, training in modes:
            module.training = training
