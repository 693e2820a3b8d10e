#!/usr/bin/env python3
"""The page of results: what was asked, what came out, made from the JSON files alone.

    python recipes/evidence/page.py [--results benchmarks/results] [--page docs/results.md]

A question whose file is not there yet is named as open, with the command that answers it.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from recipes.elastic import report as elastic
from recipes.evidence import criteria
from recipes.evidence import report as learned_steps


@dataclass(frozen=True)
class Section:
    """A question.

    Attributes:
        name: Of its files in the results folder, without suffix.
        question: The heading.
        about: What is compared with what, and why.
        answer: The text, from the content of the JSON file.
        command: What makes the file.
    """

    name: str
    question: str
    about: str
    answer: Callable[[dict[str, Any]], str]
    command: str


def _elastic(document: dict[str, Any]) -> str:
    return f"{elastic.table(document['runs'], document['blocks'])}\nMade by `{document['command']}`.\n"


SECTIONS = (
    Section(
        learned_steps.NAME,
        "Do learned steps let a pretrained network adapt faster?",
        "A public CIFAR ResNet is fine-tuned on re-encoded images, as it is and converted, each at the learning rate "
        "that suits it best. The control that would explain a gain is a learned factor for each of the same blocks, "
        "without order.",
        learned_steps.report,
        "python recipes/evidence/finetune.py --weights PATH --data folder:PATH, then recipes/evidence/report.py",
    ),
    Section(
        "elastic_depth",
        "Can the depth be chosen after one training?",
        "Trained once at a short horizon with learned times, blocks go by the size of their steps and nothing is "
        "trained after. Beside it the same at fixed steps and at T = n, and networks trained at each depth.",
        _elastic,
        "python recipes/elastic_depth.py --data fashion-mnist",
    ),
    Section(
        criteria.NAME,
        "Which blocks of a trained network can go?",
        "Criteria compared on a public CIFAR ResNet after norms are re-estimated, without fine-tuning.",
        criteria.report,
        "python recipes/evidence/criteria.py --weights PATH --data folder:PATH",
    ),
)


def page(results: Path, beside: Path) -> str:
    """The page in Markdown.

    Args:
        results: Folder of JSON files and pictures.
        beside: Folder in which the page will lie, for its links.
    """
    parts = [
        "# Results\n",
        "Written by `python recipes/evidence/page.py` from the JSON files in `benchmarks/results/`; no figure is typed "
        "by hand. Errors on re-encoded images are compared with one another only.\n",
    ]
    for section in SECTIONS:
        file = results / f"{section.name}.json"
        parts += [f"## {section.question}\n", f"{section.about}\n"]
        if not file.is_file():
            parts.append(f"Not answered yet; `{section.command}` does.\n")
            continue
        parts.append(section.answer(json.loads(file.read_text())))
        picture = results / f"{section.name}.png"
        if picture.is_file():
            parts.append(f"![{section.question}]({relpath(picture, beside)})\n")
    return "\n".join(parts)


def main() -> None:
    """The script."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    args = parser.parse_args()
    args.page.write_text(page(args.results, args.page.parent))


if __name__ == "__main__":
    main()
