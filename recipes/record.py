"""Result files: what one must say about its making, and how it is written."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LINE = 120  # columns; a series of numbers is one line, however long
DIGITS = 5  # of the numbers in a result file: no picture or table shows more
PACKAGES = ("torch-meanfield", "torch", "torchvision", "timm", "lightning")


def provenance(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit, for a result file."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"{_cpu()}, {os.cpu_count()} cores"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "commit": _commit(),
    }


def known_device(name: str) -> str:
    """``name``, if this machine has that device: the type of a command line's ``--device``.

    Raises:
        ArgumentTypeError: It has none.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ArgumentTypeError(
            f"{name!r} cannot be used here ({str(error).splitlines()[0][:100]}); try cpu"
        ) from error
    return name


def write_json(path: Path, document: Any, digits: int | None = None) -> None:
    """Write ``document`` to ``path`` whole or not at all: one line for each series of numbers.

    Args:
        path: Its folder is made if it is missing.
        document: What :func:`json.dumps` takes.
        digits: Significant digits that floating-point numbers are rounded to; ``None`` for all of them.

    Raises:
        TypeError: ``document`` is no JSON; nothing is written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w") as file:
            file.write(laid_out(document if digits is None else rounded(document, digits)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def rounded(value: Any, digits: int) -> Any:
    """A JSON document with its floating-point numbers rounded to ``digits`` significant digits.

    >>> rounded({"loss": [0.123456789, 1234567.0], "step": 1234567}, 4)
    {'loss': [0.1235, 1235000.0], 'step': 1234567}
    """
    if isinstance(value, Mapping):
        return {key: rounded(each, digits) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each, digits) for each in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) and math.isfinite(value) else value


def laid_out(value: Any, indent: int = 0) -> str:
    """A JSON document with one line for whatever fits into it, every array of numbers, and every row of a table.

    A row is an element of an array that holds no objects itself: one run with its curve.

    >>> print(laid_out({"name": "a", "values": [[1, 2.5], [3, 4.5]]}))
    {"name": "a", "values": [[1, 2.5], [3, 4.5]]}
    """
    flat = json.dumps(value, ensure_ascii=False)
    if indent + len(flat) <= LINE or not isinstance(value, (Mapping, list, tuple)) or _series(value):
        return flat
    inner, outer = "\n" + " " * (indent + 1), "\n" + " " * indent
    if isinstance(value, Mapping):
        # json.dumps writes a key that is no string as one.
        parts = [f"{json.dumps({k: 0}, ensure_ascii=False)[1:-4]}: {laid_out(v, indent + 1)}" for k, v in value.items()]
        return "{" + inner + ("," + inner).join(parts) + outer + "}"
    parts = [json.dumps(v, ensure_ascii=False) if _is_row(v) else laid_out(v, indent + 1) for v in value]
    return "[" + inner + ("," + inner).join(parts) + outer + "]"


def _is_row(value: Any) -> bool:
    """Whether ``value`` is an object without objects in it."""
    return isinstance(value, Mapping) and not any(isinstance(v, Mapping) for v in _contents(value))


def _contents(value: Any) -> Iterator[Any]:
    """All that lies in ``value``, at any depth."""
    for each in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
        yield each
        yield from _contents(each)


def _series(value: Any) -> bool:
    """Whether ``value`` is an array, perhaps of arrays, of numbers."""
    numbers = (int, float, type(None), list, tuple)
    return isinstance(value, (list, tuple)) and all(isinstance(v, numbers) for v in _contents(value))


def _cpu() -> str:
    """The processor's name where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        if package == "torch-meanfield":  # on the path, but not installed
            import torch_meanfield

            return torch_meanfield.__version__
        return None


def _commit() -> str | None:
    """The commit of this checkout, ``+`` behind it if files differ from it; ``None`` outside git."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
