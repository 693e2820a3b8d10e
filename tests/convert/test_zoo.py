"""The smallest model of each timm file: equality, re-sorting and folding, and what the committed table says of it.

The table is made by ``make zoo``. Models of more than 200 million parameters (one) are left to it.
"""

from __future__ import annotations

import csv
import warnings
from typing import Any

import pytest
import torch

from tools.zoo import Timm, numbers

timm = pytest.importorskip("timm")

LARGEST = 200_000_000
# Attention that failed on the meta device, and a table that stayed in single precision, until timm mended them.
MENDED = {"efficientvit_b0": (1, 0, 30), "convit_tiny": (1, 0, 31)}
with Timm.table.open() as _stream:
    CHECKED = {row["name"]: row for row in csv.DictReader(_stream) if row["checked"]}


def test_the_table_has_all_files_that_have_residual_blocks_of_one_kind() -> None:
    assert len({row["file"] for row in CHECKED.values()}) >= 84
    assert all(row["checked"] == "passed" for row in CHECKED.values())
    assert sum(int(row["parameters"]) <= LARGEST for row in CHECKED.values()) >= 84


@pytest.mark.parametrize("name", [n for n, row in CHECKED.items() if int(row["parameters"]) <= LARGEST])
def test_everything_holds(name: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} does not have it yet")
    if tuple(map(int, timm.__version__.split(".")[:3])) < MENDED.get(name, (0,)):
        pytest.skip(f"its fault in timm {timm.__version__} was mended in {MENDED[name]}")
    known: dict[str, Any] = CHECKED[name]
    shape = tuple(int(n) for n in known["input"].split("x"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's own
        row = numbers(lambda **a: Timm().build(name, **a), [shape])
    assert row["checked"] == "passed", row["reason"]
    for column in ("verdict", "stages", "particles", "branches", "foldable"):
        assert str(row[column]) == known[column], column
    assert torch.get_default_dtype() == torch.float32
