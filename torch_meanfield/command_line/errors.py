"""The two ways in which a command ends early, each with one line on standard error."""

from __future__ import annotations


class BadArgument(Exception):
    """Exit code 2: an argument that names nothing, or is none."""


class Refused(Exception):
    """Exit code 1: the model is one that the library does not take."""


def one_line(error: BaseException) -> str:
    """The message of ``error`` on one line, or its class where it has none.

    >>> one_line(ValueError("two\\n  lines"))
    'two lines'
    """
    return " ".join(str(error).split()) or type(error).__name__
