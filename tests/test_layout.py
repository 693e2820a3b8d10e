"""The rooms as docs/layout.md draws them, held against the imports; and the examples of docs/extending.md."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for top in ("torch_meanfield", "recipes")
    for path in (ROOT / top).rglob("*.py")
}
PRIVATE = re.compile(
    r"torch\._C\b|\._conv_forward|_compiled_call_impl|(?<!register)_optimizer_(step|state|load)_|_patch_step_function|_global_forward"
    r"|\._(modules|parameters|buffers|forward_hooks|forward_pre_hooks)\b"
)


def imports(name: str) -> set[str]:
    """The modules of ours that a module imports when it runs, wherever in it."""
    tree = ast.parse(FILES[name].read_text())
    only_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    left_out = {id(n) for block in only_types for statement in block.body for n in ast.walk(statement)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & FILES.keys() or {node.module} & FILES.keys()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & FILES.keys()
    return found - {name}


def files(room: str) -> list[str]:
    return [name for name in FILES if f"{name}.".startswith(f"torch_meanfield.{room}.")]


def test_no_import_goes_round_in_a_circle() -> None:
    faces = {name for name, path in FILES.items() if path.name == "__init__.py"}
    graph = {name: imports(name) - faces for name in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)  # raises CycleError, which names the files


@pytest.mark.parametrize(
    ("room", "strangers"),
    [
        ("particles", "depth width observe models convert record lightning theory"),
        ("depth", "width observe models convert record lightning theory"),
        ("width", "depth models convert record lightning theory"),
        ("observe", "depth width models convert record lightning theory"),
        ("models", "width convert record lightning theory"),
        ("convert", "width models record lightning theory"),
        ("width.search", "width.births width.turnover width.optimizer"),
        ("width.births", "width.turnover width.optimizer width.search"),
        ("width.turnover", "width.optimizer width.search"),
        ("record", "lightning theory"),
        ("lightning", "theory"),
    ],
)
def test_a_room_does_not_know_its_strangers(room: str, strangers: str) -> None:
    known = {name: imports(name) for name in files(room)}
    assert known
    for stranger in strangers.split():
        theirs = set(files(stranger))
        assert theirs and not {(name, other) for name, others in known.items() for other in others & theirs}


def test_private_names_of_torch_stand_in_one_file() -> None:
    found = {
        name: sorted({m.group() for m in PRIVATE.finditer(FILES[name].read_text())})
        for name in FILES
        if name.startswith("torch_meanfield.") and name != "torch_meanfield._torch"
    }
    assert not {name: names for name, names in found.items() if names}


@pytest.mark.parametrize("room", sorted({name.split(".")[1] for name in FILES if name.count(".") > 1}))
def test_every_room_is_on_the_page(room: str) -> None:
    if FILES.get(f"torch_meanfield.{room}") is not None:
        assert f"{room}/" in (ROOT / "docs/layout.md").read_text()


def test_the_examples_of_the_page_on_extending_run() -> None:
    torch.manual_seed(0)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/extending.md").read_text(), flags=re.M | re.S)
    assert len(blocks) == 5
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/extending.md", "exec"), scope)


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in ("docs/layout.md", "docs/extending.md", "CONTRIBUTING.md"):
        for path in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / path).exists(), f"{page}: {path}"
