"""The rows of the published table: each is the configuration in recipes/configs/ that has a section ``table``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from recipes.images.cli import CONFIGS


@dataclass(frozen=True)
class Row:
    """A row of the published table (Lu et al. 2020, Table 1).

    Attributes:
        title: Name of the network.
        config: File in recipes/configs.
        data: Data set it was published on.
        epochs: Length of the published schedule.
        published: Test errors in percent, vanilla and mean-field.
    """

    title: str
    config: str
    data: str
    epochs: int
    published: tuple[float, float]


def rows(folder: Path) -> dict[str, Row]:
    """The rows that the configurations in ``folder`` describe, by name, smaller networks first.

    A row is named by its file, without the data set: ``resnet20-cifar10.yaml`` is the row resnet20.

    Raises:
        ValueError: A section ``table`` lacks the title or the two published errors; the file is named.
    """
    found = {}
    for path in sorted(folder.glob("*.yaml"), key=_natural):
        config = yaml.safe_load(path.read_text())
        if config.get("table") is None:
            continue
        try:
            title, (vanilla, mean_field) = config["table"]["title"], config["table"]["published"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: table needs a title and published: [vanilla, mean-field]") from error
        trainer, data = config["trainer"], config["data"]["name"]
        if isinstance(trainer, str):
            trainer = yaml.safe_load((folder / trainer).read_text())
        name = path.stem.removesuffix(f"-{data}")
        found[name] = Row(title, path.name, data, trainer["max_epochs"], (vanilla, mean_field))
    return found


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort by the numbers in the name as numbers."""
    return [(int(digits or 0), word) for word, digits in re.findall(r"([a-z-]+)|(\d+)", path.stem)]


ROWS = rows(CONFIGS)
