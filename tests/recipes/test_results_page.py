"""The sections of the page of results say what their files say, and an answer without files is an open question."""

import json

import pytest

from benchmarks.footprint import added_lines
from recipes.evidence import cost, stationary
from recipes.evidence import report as learned_steps
from recipes.evidence.section import Section, of_file


def runs(setting, method, scores):
    return [
        {"setting": setting, "method": method, "seed": s, "score": v, "silent": 0.1} for s, v in enumerate(scores, 101)
    ]


def test_stationary_pairs_seeds_and_gives_a_verdict():
    document = {"command": "python it", "runs": runs("pixels", "bare", [0.85, 0.86, 0.87])}
    document["runs"] += runs("pixels", "library, plastic", [0.86, 0.87, 0.88, 0.99])  # nobody to pair the last with
    text = stationary.report(document)
    assert "| pixels | 86.00 | 87.00 | +1.00 ± 0.00 | 3 | 10% | 10% |" in text
    assert "Of 1 settings, wrapped is ahead beyond noise in 1 and behind in 0." in text
    document["runs"] += runs("GELU", "bare", [0.5])  # no wrapped run of it: no row
    assert "GELU" not in stationary.report(document)


def test_stationary_says_how_much_cannot_be_excluded():
    text = stationary.verdict([(0.1, 0.5), (-0.2, 0.6)])
    assert "In none of 2 settings" in text and "up to 0.8 points" in text


def test_cost_has_a_row_for_each_figure_that_is_there(tmp_path):
    assert cost.answer(tmp_path) is None
    made = {"device": "a machine", "versions": {"torch": "9.9"}}
    (tmp_path / "footprint.json").write_text(json.dumps({**made, "wheel_bytes": 123456, "lines": {"convert": 2}}))
    row = {"after": "torch", "seconds_before": 1.25, "seconds": 0.156, "bar": 0.3}
    (tmp_path / "importing.json").write_text(json.dumps({**made, "rows": {"torch_meanfield": row}}))
    text = cost.answer(tmp_path)
    assert "| wheel | 0.12 MB | `benchmarks/footprint.py` |" in text
    assert "| `import torch_meanfield` after (`import torch`) | 0.16 s (1.2 s) |" in text
    assert "importing: a machine, torch 9.9; footprint: a machine, torch 9.9." in text and "resnet" not in text
    assert set(cost.LINES) == set(cost.FILES)


def test_lines_to_add_are_the_import_and_the_call():
    text = "```python\nfrom x import wrap\na = 1  # wrap\nb = wrap(a)\nprint(wrap)\n```\n"
    assert added_lines(text, "wrap") == 2
    with pytest.raises(ValueError, match="no Python example calls other"):
        added_lines(text, "other")


def test_a_section_without_its_file_is_open_and_shows_pictures_that_exist(tmp_path):
    section = Section("Why?", "About.", of_file("a", lambda d: d["said"]), "python a.py", ("a.png", "b.png"))
    assert section.text(tmp_path, tmp_path) == "## Why?\n\nAbout.\n\nNot answered yet; `python a.py` does.\n"
    (tmp_path / "a.json").write_text('{"said": "Because.\\n"}')
    (tmp_path / "b.png").touch()
    assert section.text(tmp_path, tmp_path / "docs").endswith("Because.\n\n![Why?](../b.png)\n")


def test_fine_tuning_is_open_without_its_first_file(tmp_path):
    (tmp_path / f"{learned_steps.MORE[0]}.json").write_text("{}")
    assert learned_steps.answer(tmp_path) is None
