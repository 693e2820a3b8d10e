"""``prune MODEL``: remove the residual blocks of least worth from a trained network, and write plain weights."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from torch_meanfield.command_line.errors import BadArgument, Refused, one_line
from torch_meanfield.command_line.model import load_checkpoint_, model_and_example, read
from torch_meanfield.convert import convert, fold
from torch_meanfield.pruning import depth_scores, prune_depth_
from torch_meanfield.pruning.scores import Criterion

HELP = "score the residual blocks of a trained MODEL, remove those of least worth, and write the plain weights"


def add(parser: ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("--checkpoint", type=Path, help="state_dict of the trained model, plain or converted")
    parser.add_argument("--data", type=Path, required=True, help="file of torch.save((inputs, targets)), some hundred")
    parser.add_argument("--remove", type=int, required=True, help="how many blocks go")
    parser.add_argument("--by", choices=get_args(Criterion), default="greedy", help="the score (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="inputs in a batch (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="file for the plain state_dict of the pruned model")


def run(args: Namespace) -> tuple[str, dict[str, Any]]:
    """Text and document; writes ``--out``.

    Raises:
        BadArgument: files that cannot be read or written, or data that are no pair of tensors.
        Refused: what ``depth_scores`` or ``prune_depth_`` refuse, or a checkpoint of another model.
    """
    batches = _batches(args.data, args.batch)
    model, example = model_and_example(args, batches[0][0][:2])
    try:
        if args.checkpoint is not None:
            _load_(model, example, args.checkpoint)
        scores = depth_scores(model, batches, by=args.by, progress=False)
        report = prune_depth_(model, remove=args.remove, scores=scores, batches=batches)
        plain = fold(model)
    except (ValueError, TypeError) as error:
        raise Refused(one_line(error)) from error
    try:
        torch.save(plain.state_dict(), args.out)
    except (OSError, RuntimeError) as error:
        raise BadArgument(f"--out {args.out}: {one_line(error)}") from error
    document = {
        "model": type(model).__name__,
        "scores": dict(scores),
        "removed": report.removed,
        "parameters": report.parameters,
        "layers": report.layers,
        "constructor": None if report.constructor is None else str(report.constructor),
        "out": str(args.out),
    }
    return f"{scores}\n{report}\nwritten to {args.out}", document


def _load_(model: nn.Module, example: Any, path: Path) -> None:
    """A plain checkpoint, or that of the converted model, which ``model`` then becomes."""
    try:
        load_checkpoint_(model, path)
    except Refused as plain:
        try:
            load_checkpoint_(convert(model, example), path)
        except (Refused, ValueError):
            raise plain from None


def _batches(path: Path, size: int) -> list[tuple[Tensor, Tensor]]:
    if size < 1:
        raise BadArgument(f"--batch {size}: a batch holds at least one input")
    data = read("--data", path)
    pair = isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(t, Tensor) for t in data)
    if not pair or not len(data[0]) == len(data[1]) > 0:
        raise BadArgument(f"--data {path} must hold torch.save((inputs, targets)), two tensors of equal length")
    return list(zip(data[0].split(size), data[1].split(size), strict=True))
