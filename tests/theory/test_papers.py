"""The page of papers: every paper of the reading list is on it, and all that it names exists."""

import re
from pathlib import Path

import torch_meanfield
from torch_meanfield import theory
from torch_meanfield.theory import fluctuations

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/theory/papers.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| .*\|$", PAGE, flags=re.M)][
    2:
]
# The reading list that the theory began with.
LIST = """1606.05340 1712.08969 1804.06561 1805.01053 1805.08266 1806.01316 1806.05393 1806.05394 1808.09372 1902.08129
1906.00771 1906.02341 2001.04294 2003.05508 2006.06098 2012.15477 2105.14417 2110.02926 2110.15954 2111.02278 2112.05531
2112.05589 2201.07296 2201.11022 2202.00293 2203.12967""".split()


def test_every_paper_of_the_list_has_a_row_and_an_entry_in_the_bibliography():
    found = re.findall(r"\(arXiv:(\d{4}\.\d{5})\)", PAGE)
    assert len(found) == len(set(found)) == len(ROWS) and set(LIST) <= set(found)
    bibliography = (ROOT / "docs/bibliography.md").read_text()
    assert [paper for paper in found if paper not in bibliography] == []


def test_every_function_exists_and_says_what_it_is():
    names = [name for _, functions, _ in ROWS for name in re.findall(r"`(\w+)`", functions)]
    assert len(names) > 50 and all(re.search(r"`\w+`", functions) for _, functions, _ in ROWS)
    found = {name: next((getattr(r, name) for r in (theory, torch_meanfield, fluctuations) if hasattr(r, name)), None)
             for name in names}  # fmt: skip
    assert [name for name, thing in found.items() if not callable(thing) or not thing.__doc__] == []


def test_every_script_exists_and_imports_what_it_is_said_to_run():
    for paper, functions, scripts in ROWS:
        texts = [(ROOT / "recipes/theory" / name).read_text() for name in re.findall(r"`(\w+\.py)`", scripts)]
        assert texts and any(name in text for text in texts for name in re.findall(r"`(\w+)`", functions)), paper
