"""What one pass over the data says of each block: how far it moves the stream, and how the loss feels it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_meanfield.observe import run, tensors_in
from torch_meanfield.pruning.batches import Batch, Loss, loss_of
from torch_meanfield.pruning.blocks import Block
from torch_meanfield.pruning.control import controlled


def moved(model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch], by: str) -> dict[str, float]:
    r"""Mean over samples of :math:`1 - \cos(x, y)` or of :math:`|y - x| / |x|`, for x the stream into a block, y out.

    Args:
        model: in the mode it is to be scored in.
        blocks: those to look at.
        batches: what the model is run on.
        by: ``"cosine"`` or ``"ratio"``.

    Source: the block influence of Men et al. 2024, over whole samples instead of tokens.
    """
    totals = dict.fromkeys((b.name for b in blocks), 0.0)
    for batch in batches:
        seen = _Streams()
        with torch.no_grad(), controlled(model, blocks, seen):
            run(model, batch.inputs)
        for name, change in seen.added.items():
            x, f = seen.entered[name].flatten(1).double(), change.flatten(1).double()
            ratio = f.norm(dim=1) / x.norm(dim=1).clamp(min=1e-30)
            values = ratio if by == "ratio" else 1 - F.cosine_similarity(x, x + f)
            totals[name] += float(values.sum())
    samples = sum(batch.size for batch in batches)
    return {name: value / samples for name, value in totals.items()}


class _Streams:
    """Keeps, for each block, the stream that enters it and what it adds."""

    def __init__(self) -> None:
        self.entered: dict[str, Tensor] = {}
        self.added: dict[str, Tensor] = {}

    def __call__(self, block: Block, i: int, x: Tensor, forward: Callable[[], Any]) -> Any:
        before = x.clone()  # the block may write into it
        self.entered.setdefault(block.name, before)
        out = forward()
        if block.outside[i] is not None:
            result = _stream(block, i, before, out)
            change = result.clone() if block.outside[i] else result - before
            self.added[block.name] = self.added[block.name] + change if block.name in self.added else change
        return out


def _stream(block: Block, i: int, x: Tensor, out: Any) -> Tensor:
    """What part i of ``block`` puts out that has the shape of the stream."""
    result = next((t for t in tensors_in(out) if t.shape == x.shape), None)
    if result is None:
        raise ValueError(f"depth_scores: {block.parts[i]} puts out no tensor of the stream's shape {tuple(x.shape)}")
    return result


def fisher(
    model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch], loss: Loss, caller: str
) -> dict[str, float]:
    r"""Half the mean over samples of the squared derivative of the sample's loss by a gate at 1 on the block's branch.

    The derivative is :math:`\langle \partial E_n/\partial y, y - x\rangle` with y what the block puts out; half its
    square is, to second order at an optimum, what the loss of a log-likelihood rises by without the block.

    Args:
        model: in the mode it is to be scored in.
        blocks, batches: as ever.
        loss: the mean over a batch.
        caller: named in errors.

    Source: Theis et al. 2018, with a gate on a whole branch for that on a feature map.
    """
    totals = dict.fromkeys((b.name for b in blocks), 0.0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for batch in batches:
        gates = _Gates(batch.size, caller)
        with torch.enable_grad(), controlled(model, blocks, gates):
            value = loss_of(loss, run(model, batch.inputs), batch.targets, caller)
        if not value.requires_grad or not parameters:
            raise ValueError(f"{caller}: the loss has no gradient; unfreeze the parameters, or score by 'greedy'")
        torch.autograd.grad(value, parameters, allow_unused=True)  # nothing is added to .grad
        for name, each in gates.derivatives.items():
            totals[name] += float(each.square().sum()) / 2
    samples = sum(batch.size for batch in batches)
    return {name: value / samples for name, value in totals.items()}


class _Gates:
    """Gathers, for each block, the derivatives of the samples' losses by a gate on its branch."""

    def __init__(self, size: int, caller: str) -> None:
        self.size, self.caller = size, caller
        self.derivatives: dict[str, Tensor] = {}

    def __call__(self, block: Block, i: int, x: Tensor, forward: Callable[[], Any]) -> Any:
        before = x.detach().clone()
        out = forward()
        if block.outside[i] is None:
            return out
        result = _stream(block, i, before, out)
        if not result.requires_grad:
            raise ValueError(
                f"{self.caller}: no gradient reaches {block.parts[i]}; unfreeze the parameters, or score by 'greedy'"
            )
        change = result.detach().clone() if block.outside[i] else result.detach() - before

        def keep(grad: Tensor) -> None:
            each = self.size * (grad.double() * change.double()).flatten(1).sum(1)
            known = self.derivatives.get(block.name)
            self.derivatives[block.name] = each if known is None else known + each

        cast(Any, result).register_hook(keep)
        return out
