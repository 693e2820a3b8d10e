"""Running a model with each of its removable blocks under control: watched, left out, or replaced by what it put out.

Each part of a block is called through an :class:`Act`, from outside the model: the ``solver`` of a stack, the
``forward`` of a converted block. Nothing of the model is changed once the context is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torch_meanfield._torch import is_batch_norm
from torch_meanfield.depth import MeanFieldSequential
from torch_meanfield.observe import tensors_in
from torch_meanfield.pruning.blocks import Block, layers_by_name

# What is called instead of part i of a block: with the block, i, the stream that goes in, and what runs the part.
Act = Callable[[Block, int, Tensor, Callable[[], Any]], Any]


@contextmanager
def controlled(model: nn.Module, blocks: Sequence[Block], act: Act) -> Iterator[None]:
    """Let ``act`` stand between ``model`` and each part of ``blocks`` while the context lasts."""
    with ExitStack() as stack:
        for name, layer in layers_by_name(model).items():
            mine = [b for b in blocks if b.layer == name]
            if isinstance(layer, MeanFieldSequential):
                solver = layer.solver
                stack.callback(layer.__dict__.update, solver=solver)
                layer.solver = _solver(solver, {id(layer[b.slot]): b for b in mine}, act)
                continue
            for block in mine:
                for i, part in enumerate(block.parts):
                    module = model.get_submodule(part)
                    forward = module.__dict__.get("forward")
                    undo = module.__dict__.pop if forward is None else module.__dict__.__setitem__
                    stack.callback(undo, "forward", forward)
                    module.__dict__["forward"] = _forward(module.forward, block, i, act)
        yield


def _solver(solver: Callable[..., Tensor], blocks: dict[int, Block], act: Act) -> Callable[..., Tensor]:
    def controlled_solver(x: Tensor, branch: nn.Module, step: Tensor) -> Tensor:
        out: Tensor = act(blocks[id(branch)], 0, x, lambda: solver(x, branch, step))
        return out

    return controlled_solver


def _forward(forward: Callable[..., Any], block: Block, i: int, act: Act) -> Callable[..., Any]:
    def controlled_forward(*args: Any, **kwargs: Any) -> Any:
        stream = tensors_in((args, kwargs))
        if not stream:
            raise ValueError(f"depth_scores: {block.parts[i]} is called without a tensor, so it cannot be left out")
        return act(block, i, stream[0], lambda: forward(*args, **kwargs))

    return controlled_forward


def left_out(block: Block, i: int, x: Tensor, known: Any) -> Any:
    """What part i of ``block`` puts out where it is left out.

    Args:
        block, i: which part.
        x: the stream that goes in.
        known: what the part put out on this batch when it ran.
    """
    if block.outside[i]:
        return _mapped(torch.zeros_like, known)
    if isinstance(known, Tensor):
        return x
    if type(known) in (tuple, list) and known and isinstance(known[0], Tensor) and known[0].shape == x.shape:
        return type(known)([x, *known[1:]])
    raise ValueError(
        f"depth_scores: {block.parts[i]} puts out a {type(known).__name__}, in which the stream cannot be told from "
        f"the rest; score by 'step', or pass scores of your own to prune_depth_"
    )


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return type(value)([_mapped(change, v) for v in value]) if type(value) in (tuple, list) else value


@contextmanager
def scoring_mode(model: nn.Module, *, batch_statistics: bool) -> Iterator[None]:
    """``eval()``, but for batch norms that are to use the statistics of the batch; all as it was afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    norms = [m for m in model.modules() if is_batch_norm(type(m))] if batch_statistics else []
    kept = [(t, t.clone()) for m in norms for t in m.buffers(recurse=False)]
    try:
        model.eval()
        for norm in norms:
            norm.training = True
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
        for module, training in modes:
            module.training = training
