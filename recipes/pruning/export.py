"""The end of a pruning: a plain network of fewer blocks in a file, proven by loading it into plain timm."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes.finetune.export import ROUNDED, TOLERANCE, NotTheSame
from torch_meanfield import fold
from torch_meanfield.pruning import PruneReport


@torch.no_grad()
def export(
    net: nn.Module, report: PruneReport, images: Tensor, folder: Path | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Fold ``net`` and write it.

    Where a call is known that makes a plain network of these depths, ``pruned.pt`` holds the state dict for it, loaded
    with ``strict=True``; else ``pruned.pt2`` holds the network as ``torch.export`` has it, for batches of any size.
    Either is read back, run on ``images``, and appears only if it computes what ``net`` does.

    Args:
        net: Trained and converted; it stays as it is.
        report: Of the removal.
        images: Normalised, shape ``(N, C, H, W)``, at least two.
        folder: Where to; ``None`` to prove without writing.

    Returns:
        the folded network in ``eval()``, and ``file``, ``made_by`` (the call, or ``None``) and ``error`` (largest
        difference of the logits over the largest logit).

    Raises:
        NotTheSame: The outputs differ by more than the tolerance. Nothing is written then.
    """
    folded = fold(net, images[:1]).eval().cpu()
    dtype = next(folded.parameters()).dtype
    images = images.to("cpu", dtype)
    expected = _eval(net, images)
    if report.constructor is None:
        name, written, plain = _exported(folded, images)
    else:
        name, written, plain = _loaded(folded, report)
    difference = (_eval(plain, images) - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    error = float(difference)
    if not error <= TOLERANCE.get(dtype, ROUNDED):
        raise NotTheSame(
            f"{report.constructor or name} with the folded weights differs from the trained model: relative error "
            f"{error:.1e}, above {TOLERANCE.get(dtype, ROUNDED):.0e}; nothing written"
        )
    if folder is not None:
        partial = folder / f"{name}.partial"
        try:
            partial.write_bytes(written)
            os.replace(partial, folder / name)
        finally:
            partial.unlink(missing_ok=True)
    made_by = None if report.constructor is None else str(report.constructor)
    return folded, {"file": folder and name, "made_by": made_by, "error": error}


def _loaded(folded: nn.Module, report: PruneReport) -> tuple[str, bytes, nn.Module]:
    assert report.constructor is not None
    buffer = io.BytesIO()
    torch.save({k: v.detach().clone() for k, v in folded.state_dict().items()}, buffer)
    plain: nn.Module = report.constructor()
    plain.to(next(folded.parameters()).dtype)
    plain.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True), strict=True)
    return "pruned.pt", buffer.getvalue(), plain


def _exported(folded: nn.Module, images: Tensor) -> tuple[str, bytes, nn.Module]:
    buffer = io.BytesIO()
    rows = torch.export.Dim("batch", max=2**31 - 1)  # without a bound torch 2.6 finds the largest int64 left out
    program = torch.export.export(folded, (images[:2],), dynamic_shapes=({0: rows},))
    torch.export.save(program, buffer)
    return "pruned.pt2", buffer.getvalue(), program.module()  # not loaded again: that would unpickle


def _eval(model: nn.Module, images: Tensor) -> Tensor:
    modes = [(m, m.training) for m in model.modules()]
    parameter = next(model.parameters(), None)
    device = images.device if parameter is None else parameter.device
    try:
        for module, _ in modes:
            module.training = False  # an exported program has no eval()
        return model.to("cpu")(images).double()
    finally:
        model.to(device)
        for module, training in modes:
            module.training = training
