"""MODEL on the command line: a timm name or ``module:factory``, its weights and its example input."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_meanfield.command_line.errors import BadArgument, Refused, one_line
from torch_meanfield.convert.example_input import example_for
from torch_meanfield.particles import load_whole_


def add_model(parser: ArgumentParser) -> None:
    """The arguments that name a model."""
    parser.add_argument("model", metavar="MODEL", help="a timm name, or module:factory (a callable without arguments)")
    parser.add_argument(
        "--input", metavar="1,3,224,224", type=shape, help="shape of the input; timm models know theirs"
    )
    parser.add_argument("--pretrained", action="store_true", help="timm's pretrained weights (downloaded)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def shape(text: str) -> tuple[int, ...]:
    """``"1,3,224,224"`` as numbers."""
    sizes = tuple(int(part) for part in text.split(",") if part.strip())
    if not sizes or min(sizes) < 1:
        raise ValueError(text)
    return sizes


def model_and_example(args: Namespace, default: Any = None) -> tuple[nn.Module, Any]:
    """The model that ``args.model`` names, and an input of it; ``default`` where it brings none.

    A factory gives a module, or a pair of a module and its example input.

    Raises:
        BadArgument: there is no such model, or no example of its input.
    """
    if args.pretrained and ":" in args.model:
        raise BadArgument(f"--pretrained is for timm's models; {args.model} loads its own weights")
    made = _from_factory(args.model) if ":" in args.model else _from_timm(args.model, args.pretrained)
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise BadArgument(f"{args.model} gives a {type(model).__name__}, no torch.nn.Module")
    if args.input is not None:
        example = torch.randn(args.input, generator=torch.Generator().manual_seed(0))
    example = default if example is None else example
    try:
        return model, example_for(model, example, "the command line")
    except ValueError as error:
        raise BadArgument(f"{args.model} does not know its input size; pass --input, such as --input 1,16") from error


def batch_of(example: Any, size: int, model: str) -> Tensor:
    """``size`` standard normal inputs of the example's shape; an integer example is repeated.

    Raises:
        BadArgument: the example is no tensor with a batch dimension.
    """
    if not isinstance(example, Tensor) or example.ndim < 2:
        raise BadArgument(f"{model} is not called with one batched tensor, which diagnose needs; pass --input")
    if not example.is_floating_point():
        return example[:1].expand(size, *example.shape[1:]).clone()
    return torch.randn((size, *example.shape[1:]), generator=torch.Generator().manual_seed(0)).to(example)


def load_checkpoint_(model: nn.Module, path: Path) -> None:
    """Load the ``state_dict`` in a file, or under ``state_dict`` or ``model`` in it; whole, or not at all.

    Raises:
        BadArgument: there is no such file, or it is none of these.
        Refused: its entries are not those of the model.
    """
    state = read("--checkpoint", path)
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    try:
        load_whole_(model, state)
    except (RuntimeError, TypeError, ValueError) as error:
        raise Refused(f"--checkpoint {path}: {one_line(error)[:400]}") from error


def read(option: str, path: Path) -> Any:
    """What ``torch.save`` wrote to a file, tensors and plain types alone; nothing in it is executed.

    Raises:
        BadArgument: there is no such file, or it holds something else. The message names ``option``.
    """
    if not path.is_file():
        raise BadArgument(f"{option} {path}: there is no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own messages advise to load what is not trusted
        raise BadArgument(
            f"{option} {path}: no file of torch.save with tensors and plain types alone ({type(error).__name__})"
        ) from error


def _from_timm(name: str, pretrained: bool) -> Any:
    try:
        import timm

        import torch_meanfield.models.timm  # noqa: F401  # so that our own names are known too
    except ModuleNotFoundError as error:
        raise BadArgument(
            f"{name!r} would be one of timm's models, and timm is not installed: pip install 'torch-meanfield[timm]'; "
            "a model of your own is named module:factory"
        ) from error
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; a model of your own is named module:factory"
        raise BadArgument(f"timm has no model {name!r}{hint}")
    try:
        return timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # an unknown tag of weights, a download that fails, a package that this model needs
        raise BadArgument(f"timm cannot make {name!r}: {one_line(error)[:300]}") from error


def _from_factory(text: str) -> Any:
    module_name, _, factory_name = text.partition(":")
    if os.getcwd() not in sys.path:  # an installed script does not look into the current folder by itself
        sys.path.insert(0, os.getcwd())
    try:
        factory = importlib.import_module(module_name)
        for part in factory_name.split("."):
            factory = getattr(factory, part)
    except (ImportError, ValueError, AttributeError) as error:
        raise BadArgument(f"{text}: {one_line(error)}; MODEL is module:factory, importable from here") from error
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise BadArgument(f"{text} is a {type(factory).__name__}; MODEL names a callable that gives a torch.nn.Module")
    try:
        return factory()
    except Exception as error:
        raise BadArgument(f"{text}() raised {type(error).__name__}: {one_line(error)}") from error
