"""The one error a recipe raises for what its user can mend, and how a script ends on it."""

from __future__ import annotations

import sys
from typing import NoReturn


class BadInput(ValueError):
    """A wrong argument, file or folder. The message is one line: what is wrong, its value, what to do instead."""


def one_line(error: BaseException) -> str:
    """The message of ``error`` on one line.

    A DataLoader worker re-raises with the whole traceback as the message; its last line is the message proper.
    """
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].split(": ", 1)[-1]
    return " ".join(text.split())


def leave(script: str, error: BaseException) -> NoReturn:
    """End the script with exit code 2 and ``script: error: message`` on standard error, without a traceback."""
    print(f"{script}: error: {one_line(error)}", file=sys.stderr)
    raise SystemExit(2)
