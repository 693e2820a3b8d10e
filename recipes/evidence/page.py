#!/usr/bin/env python3
"""The page of results: what was asked, what came out, made from the JSON files alone.

    python recipes/evidence/page.py [--results benchmarks/results] [--page docs/results.md]

A question whose file is not there yet is named as open, with the command that answers it.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its siblings are found from the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from recipes.cuts import report as cuts
from recipes.elastic import report as elastic
from recipes.evidence import cost, criteria, deep, rates, stationary, times
from recipes.evidence import report as learned_steps
from recipes.evidence.section import Section, of_file


def _elastic(document: dict[str, Any]) -> str:
    return f"{elastic.table(document['runs'], document['blocks'])}\nMade by `{document['command']}`.\n"


SECTIONS = (
    Section(
        "Is it the times or the small steps?",
        "Networks from scratch with steps fixed at T / n, the same learned, and learned factors without order.",
        of_file(times.NAME, times.report),
        "python recipes/evidence/times.py --data folder:PATH",
        (f"{times.NAME}.png",),
    ),
    Section(
        "Do short steps train deep stacks without norms?",
        "Beside ordinary residual stacks, layer norm, and learned factors that begin at 0.",
        of_file(deep.NAME, deep.report),
        "python recipes/evidence/deep.py --data folder:PATH",
        (f"{deep.NAME}.png",),
    ),
    Section(
        "Is there one learning rate for all depths?",
        "At T = n, where every step is 1, and at one T for all depths; and which of the two ends lower.",
        of_file(rates.NAME, rates.report),
        "python recipes/evidence/rates.py --data folder:PATH",
        (f"{rates.NAME}.png",),
    ),
    Section(
        "Do learned steps let a pretrained network adapt faster?",
        "A public CIFAR ResNet is fine-tuned on re-encoded images, as it is and converted, each at the learning rate "
        "that suits it best. The control that would explain a gain is a learned factor for each of the same blocks, "
        "without order.",
        learned_steps.answer,
        "python recipes/evidence/finetune.py --weights PATH --data folder:PATH, then recipes/evidence/report.py",
        tuple(f"{name}.png" for name in (learned_steps.NAME, *learned_steps.MORE)),
    ),
    Section(
        "Can the depth be chosen after one training?",
        "Trained once at a short horizon with learned times, blocks go by the size of their steps and nothing is "
        "trained after. Beside it the same at fixed steps and at T = n, and networks trained at each depth.",
        of_file("elastic_depth", _elastic),
        "python recipes/elastic_depth.py --data fashion-mnist",
        ("elastic_depth.png",),
    ),
    Section(
        "Which blocks of a trained network can go?",
        "Criteria compared on a public CIFAR ResNet after norms are re-estimated, without fine-tuning.",
        of_file(criteria.NAME, criteria.report),
        "python recipes/evidence/criteria.py --weights PATH --data folder:PATH",
    ),
    Section(
        "What is a cut network worth after fine-tuning?",
        "Half of the blocks of a public CIFAR ResNet removed by several criteria, beside channels that torch-pruning "
        "cuts down to the same latency; every arm fine-tuned by the same steps.",
        of_file("cuts_resnet56", cuts.report),
        "python recipes/evidence/cuts.py --weights PATH --data folder:PATH",
        ("cuts_resnet56.png",),
    ),
    Section(
        "Should I wrap my ordinary training?",
        "Birth and death of units on data that stay: an MLP on Fashion-MNIST, test accuracy in % after the last epoch, "
        'the optimizer bare and wrapped with `scheme="plastic"`.',
        of_file("stationary", stationary.report),
        "python recipes/plasticity/stationary.py --data fashion-mnist --out benchmarks/results",
        ("stationary.png",),
    ),
    Section(
        "What does it cost to use?",
        "Step time as a ratio to the same training without the library, measured in turns on one machine; memory, "
        "import time, the size of the wheel and the lines to add. On a GPU nothing has been measured: its owner can "
        "run `bash benchmarks/gpu.sh --data cifar10`.",
        cost.answer,
        "python benchmarks/step_overhead.py",
    ),
)


def page(results: Path, beside: Path) -> str:
    """The page in Markdown.

    Args:
        results: Folder of JSON files and pictures.
        beside: Folder in which the page will lie, for its links.
    """
    head = (
        "# Results\n\n"
        "Written by `python recipes/evidence/page.py` from the JSON files in `benchmarks/results/`; no figure is typed "
        "by hand. Errors on re-encoded images are compared with one another only.\n"
    )
    return "\n".join([head, *(section.text(results, beside) for section in SECTIONS)])


def main() -> None:
    """The script."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    args = parser.parse_args()
    args.page.write_text(page(args.results, args.page.parent))


if __name__ == "__main__":
    main()
