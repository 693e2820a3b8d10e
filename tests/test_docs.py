"""The site without building it: the reference names what is public, every page is in a contents list, one version."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.reference import pages, public

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def described():
    """The objects that docs/api/ describes, by the name it gives them."""
    text = "".join(path.read_text() for path in sorted((DOCS / "api").glob("*.md")))
    return re.findall(r"^\.\. auto(?:class|function):: (\S+)$", text, flags=re.M)


def resolved(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


NOT_FOR_USERS = {"observe"}
ROOMS = {p.parent.name for p in ROOT.glob("torch_meanfield/*/__init__.py")} - NOT_FOR_USERS - {"lightning"}


@pytest.mark.parametrize("module", ["torch_meanfield", *(f"torch_meanfield.{room}" for room in sorted(ROOMS))])
def test_every_public_name_is_in_the_reference(module):
    """If not: python tools/reference.py."""
    there = [resolved(name) for name in described() if ".lightning." not in name]
    names = public(module)
    assert names
    assert not [n for n in names if not any(resolved(f"{module}.{n}") is each for each in there)]


def test_every_public_name_of_the_lightning_room_is_in_the_reference():
    pytest.importorskip("lightning")
    there = [resolved(name) for name in described()]
    names = public("torch_meanfield.lightning")
    assert not [n for n in names if not any(resolved(f"torch_meanfield.lightning.{n}") is each for each in there)]


def test_the_reference_names_nothing_twice_and_each_object_has_a_docstring():
    names = described()
    assert len(names) == len(set(names)) > 80
    assert not [n for n in names if ".lightning." not in n and not resolved(n).__doc__]


def test_the_pages_of_the_reference_are_those_that_the_tool_writes():
    pytest.importorskip("lightning")
    assert {path: (DOCS / path).read_text() for path in pages()} == pages()


def test_the_table_in_front_of_the_reference_is_the_packages_namespace():
    table = re.findall(r"^\| `torch_meanfield\.(\w+)`", (DOCS / "api.md").read_text(), flags=re.M)
    assert table == public("torch_meanfield")


def test_every_page_is_in_a_table_of_contents():
    entries = []
    for page in ("index.md", "api.md"):
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```", (DOCS / page).read_text(), flags=re.M | re.S):
            entries += [line for line in block.splitlines() if line and not line.startswith(":")]
    pages = {p.relative_to(DOCS).with_suffix("").as_posix() for p in DOCS.rglob("*.md") if "_build" not in p.parts}
    pages = {p for p in pages if not p.startswith(("auto_", "_")) and p != "index"}
    assert not [p for p in pages if not any(Path(p).match(entry) for entry in entries)]
    globs = [e for e in entries if "*" in e]
    assert not [e for e in entries if e not in globs and not e.startswith("auto_") and e not in pages]


def test_the_tutorials_end_with_a_picture_and_name_their_subject():
    scripts = sorted((DOCS / "tutorials").glob("t*.py"))
    assert len(scripts) >= 4
    for path in scripts:
        text = path.read_text()
        assert re.match(r'"""\n(.+)\n=+\n', text) and "plt.show()" in text, path.name
        ours = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and "meanfield" in str(n.module)]
        assert ours and all(resolved(f"{n.module}.{alias.name}") for n in ours for alias in n.names), path.name


def test_the_release_is_consistent():
    told = subprocess.run(
        [sys.executable, str(ROOT / "tools/release.py"), "consistent"], capture_output=True, text=True, cwd=ROOT
    )
    assert told.returncode == 0, told.stderr


def test_the_links_of_a_page_that_leave_the_folder_lead_to_files(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    outside = importlib.import_module("outside")
    text = "[a](../CONTRIBUTING.md) [b](start.md) ![c](../benchmarks/results/labels.png) [d](../tests/properties)"
    expected = "{download}`a <../CONTRIBUTING.md>` [b](start.md) ![c](../benchmarks/results/labels.png) "
    assert outside.rewrite(text, DOCS, "https://host") == expected + "[d](https://host/tree/main/tests/properties)"


def test_the_map_of_the_rooms_is_drawn_with_all_arrows_downwards(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    room_map = importlib.import_module("room_map")
    (chart,) = re.findall(r"```mermaid\n(.*?)```", (DOCS / "layout.md").read_text(), flags=re.S)
    boxes, arrows = room_map.parsed(chart)
    level = {name: i for i, row in enumerate(room_map.layers(boxes, arrows)) for name in row}
    assert set(level) == set(boxes) and all(level[tail] < level[head] for tail, head in arrows)
    room_map.draw(chart, tmp_path / "map.svg")
    assert (tmp_path / "map.svg").stat().st_size > 1000
