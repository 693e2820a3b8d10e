"""``diagnose MODEL``: what mean-field theory sees in it."""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch_meanfield.command_line.errors import BadArgument, Refused, one_line
from torch_meanfield.command_line.model import batch_of, load_checkpoint_, model_and_example
from torch_meanfield.theory import diagnose

HELP = "lengths, gradients, dead units and advice, layer by layer, on a batch of standard normal inputs"


def add(parser: ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("--batch", type=int, default=16, help="number of inputs (default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="a state_dict to look at, in place of random weights")


def run(args: Namespace) -> tuple[str, dict[str, Any]]:
    """Text and document.

    Raises:
        BadArgument: a batch of fewer than two inputs.
        Refused: what ``diagnose`` refuses, or a model that does not run on the batch.
    """
    if args.batch < 2:
        raise BadArgument(f"--batch {args.batch}: correlations need at least two inputs")
    model, example = model_and_example(args)
    if args.checkpoint is not None:
        load_checkpoint_(model, args.checkpoint)
    batch = batch_of(example, args.batch, args.model)
    try:
        found = diagnose(model, batch)
    except Exception as error:  # what diagnose refuses, or what the model's own forward raises on this input
        raise Refused(f"{type(error).__name__}: {one_line(error)}") from error
    document = {
        "model": found.model,
        "batch": found.batch,
        "loss": {"name": found.loss_name, "value": found.loss},
        "layers": [{key: _json(value) for key, value in asdict(layer).items()} for layer in found.layers],
        "kernel": {"eigenvalues": found.kernel.eigenvalues.tolist(), "skipped": found.kernel.skipped},
        "findings": [asdict(finding) for finding in found.findings],
    }
    return str(found), document


def _json(value: Any) -> Any:
    """JSON has neither nan nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
