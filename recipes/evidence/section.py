"""What a section of the page of results is: a question, and the answer that the result files give."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path
from typing import Any

Answer = Callable[[Path], str | None]


@dataclass(frozen=True)
class Section:
    """A question.

    Attributes:
        question: The heading.
        about: What is compared with what, and why.
        answer: The text, from the folder of results; ``None`` as long as a file that it needs is not there.
        command: What makes the files.
        pictures: Names of PNG files in the folder of results; shown if they are there.
    """

    question: str
    about: str
    answer: Answer
    command: str
    pictures: tuple[str, ...] = ()

    def text(self, results: Path, beside: Path) -> str:
        """The section in Markdown.

        Args:
            results: Folder of JSON files and pictures.
            beside: Folder in which the page will lie, for its links.
        """
        parts = [f"## {self.question}\n", f"{self.about}\n"]
        answer = self.answer(results)
        if answer is None:
            return "\n".join([*parts, f"Not answered yet; `{self.command}` does.\n"])
        shown = [results / picture for picture in self.pictures if (results / picture).is_file()]
        parts += [answer, *(f"![{self.question}]({relpath(path, beside)})\n" for path in shown)]
        return "\n".join(parts)


def of_file(name: str, report: Callable[[dict[str, Any]], str]) -> Answer:
    """The answer that ``report`` gives to the content of ``name``.json."""

    def answer(results: Path) -> str | None:
        path = results / f"{name}.json"
        return report(json.loads(path.read_text())) if path.is_file() else None

    return answer
