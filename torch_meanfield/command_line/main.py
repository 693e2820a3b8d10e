"""The command line's parser, its one-line errors and its exit codes."""

from __future__ import annotations

import json
import os
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import NoReturn

import torch_meanfield
from torch_meanfield.command_line import diagnose, fold, prune, report
from torch_meanfield.command_line.errors import BadArgument, Refused, one_line
from torch_meanfield.command_line.model import add_model

PROGRAM = "torch-meanfield"


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadArgument(f"{message} ({self.prog} --help lists the arguments)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: those after the program's name; ``None``: the process's.

    Returns:
        The exit code: 0 done, 1 the model was refused, 2 a wrong argument. Errors are one line on standard error.

    Example:
        >>> main(["report", "no_such_module:network"])  # with one line on standard error
        2
    """
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(
            f"{PROGRAM}: warning: {' '.join(str(message).split())}", file=sys.stderr
        )
        try:
            args = _parser().parse_args(arguments)
            text, document = args.run(args)
        except BadArgument as error:
            print(f"{PROGRAM}: error: {one_line(error)}", file=sys.stderr)
            return 2
        except Refused as error:
            print(f"{PROGRAM}: refused: {one_line(error)}", file=sys.stderr)
            return 1
    try:
        print(json.dumps(document, indent=1, allow_nan=False) if args.json else text, flush=True)
    except BrokenPipeError:  # the reader has seen enough (head); what Python still flushes at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Look at a PyTorch model as the mean-field theory sees it.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {torch_meanfield.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in (("report", report), ("diagnose", diagnose), ("fold", fold), ("prune", prune)):
        sub = commands.add_parser(name, help=command.HELP, description=command.HELP)
        add_model(sub)
        if hasattr(command, "add"):
            command.add(sub)
        sub.set_defaults(run=command.run)
    return parser
