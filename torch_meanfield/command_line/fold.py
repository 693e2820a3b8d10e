"""``fold MODEL``: a trained converted checkpoint as plain weights."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch

from torch_meanfield.command_line.errors import BadArgument, Refused, one_line
from torch_meanfield.command_line.model import load_checkpoint_, model_and_example
from torch_meanfield.convert import conversion_report, convert, fold

HELP = "convert MODEL, load a trained converted state_dict into it, and write the plain one"


def add(parser: ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="state_dict of the converted, trained model")
    parser.add_argument("--out", type=Path, required=True, help="file for the plain state_dict")


def run(args: Namespace) -> tuple[str, dict[str, Any]]:
    """Text and document; writes ``--out``.

    Raises:
        BadArgument: the checkpoint cannot be read, or the file not be written.
        Refused: what ``convert`` or ``fold`` refuse, or a checkpoint of another model.
    """
    model, example = model_and_example(args)
    try:
        converted = convert(model, example)
        load_checkpoint_(converted, args.checkpoint)
        plain = fold(converted)
    except ValueError as error:
        raise Refused(one_line(error)) from error
    report = conversion_report(plain)
    try:
        torch.save(plain.state_dict(), args.out)
    except (OSError, RuntimeError) as error:
        raise BadArgument(f"--out {args.out}: {one_line(error)}") from error
    steps = {s.name: conversion_report(converted).stages[i].module for i, s in enumerate(report.stages)}
    sizes = {name: [] if m is None else m.steps().tolist() for name, m in steps.items()}
    document = {"model": report.model, "out": str(args.out), "relative_error": report.fold_error, "steps": sizes}
    return f"{report}\nwritten to {args.out}", document
