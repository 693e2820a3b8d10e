"""The rooms as docs/layout.md draws them, held against the imports; and the examples of docs/extending.md."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
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
            for alias in node.names:
                found |= {f"{node.module}.{alias.name}"} & FILES.keys() or {node.module} & FILES.keys()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & FILES.keys()
    return found - {name}


def files(room: str) -> list[str]:
    return [name for name in FILES if f"{name}.".startswith(f"torch_meanfield.{room}.")]


def test_no_import_goes_round_in_a_circle() -> None:
    graph = {name: imports(name) for name in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)  # raises CycleError, which names the files


def drawn() -> tuple[dict[str, str], dict[str, set[str]]]:
    """The modules that the picture of docs/layout.md names, by their label in it, and the arrows from each."""
    picture = re.search(r"```mermaid\n(.*?)```", (ROOT / "docs/layout.md").read_text(), flags=re.S)
    assert picture is not None
    rooms = {
        label: "torch_meanfield." + path.removesuffix(".py").rstrip("/").replace("/", ".")
        for label, path in re.findall(r'(\w+)\["(.*?)<br/>', picture[1])
    }
    arrows = {
        rooms[tail]: {rooms[head] for head in heads.split(" & ")}
        for tail, heads in re.findall(r"(\w+) --> (.*)", picture[1])
    }
    return rooms, arrows


def test_the_arrows_of_the_picture_are_the_imports() -> None:
    rooms, arrows = drawn()
    # What the wing offers as a whole stands in its uppermost room.
    uppermost = {"torch_meanfield.width": rooms["optimizer"]}

    def room(name: str) -> str | None:
        inside = [other for other in rooms.values() if f"{name}.".startswith(f"{other}.")]
        return max(inside, key=len, default=uppermost.get(name))

    faces = {"torch_meanfield", *uppermost}  # their __init__.py names everything
    at_home = [name for name in FILES if name.startswith("torch_meanfield") and name not in faces]
    assert not [name for name in at_home if room(name) is None]
    taken = {(room(name), room(other)) for name in at_home for other in imports(name)}
    direct = {(tail, head) for tail, heads in arrows.items() for head in heads}
    assert not direct - taken, "arrows that no import needs"
    allowed = {other: {other} for other in rooms.values()}
    for other in TopologicalSorter(arrows).static_order():
        allowed[other] |= {far for near in arrows.get(other, ()) for far in allowed[near]}
    assert not {(tail, head) for tail, head in taken if tail and head and head not in allowed[tail]}, (
        "imports without an arrow"
    )


@pytest.mark.parametrize(
    ("room", "strangers"),
    [
        ("particles", "depth width observe models convert pruning record lightning theory"),
        ("depth", "width observe models convert pruning record lightning theory"),
        ("width", "depth models convert record lightning theory"),
        ("observe", "depth width models convert record lightning theory"),
        ("models", "width convert pruning record lightning theory"),
        ("convert", "width models pruning record lightning theory"),
        ("pruning", "width record lightning theory"),
        ("width.search", "width.births width.turnover width.optimizer"),
        ("width.births", "width.turnover width.optimizer width.search"),
        ("width.turnover", "width.optimizer width.search"),
        ("record", "pruning lightning theory"),
        ("lightning", "theory"),
    ],
)
def test_a_room_does_not_know_its_strangers(room: str, strangers: str) -> None:
    known = {name: imports(name) for name in files(room)}
    assert known
    for stranger in strangers.split():
        theirs = set(files(stranger))
        assert theirs and not {(name, other) for name, others in known.items() for other in others & theirs}


def private(name: str) -> Iterator[tuple[str, bool]]:
    """Names with one leading underscore that a file asks for, as attributes or imports, or that it makes itself."""
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        names: list[tuple[str, bool]] = []
        if isinstance(node, ast.Attribute):
            own = isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"
            names = [(node.attr, own)]
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [(node.name, True)]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names = [(node.id, True)]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("torch_meanfield"):
            path = (node.module or "").split(".")
            names = [(part, False) for alias in node.names for part in (*path, alias.name)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            names = [(arg.value, False) for arg in node.args[1:] if isinstance(arg, ast.Constant)]
        yield from ((n, made) for n, made in names if str(n).startswith("_") and not str(n).startswith("__"))


# Of the language, and what torch's classes ask their heirs to override.
PUBLIC = {"_fields", "_apply", "_load_from_state_dict"}


def test_private_names_of_torch_stand_in_one_file() -> None:
    ours = [name for name in FILES if name.startswith("torch_meanfield.") and name != "torch_meanfield._torch"]
    made = {n for name in ours for n, here in private(name) if here}
    found = {name: {n for n, _ in private(name)} - made - PUBLIC for name in ours}
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


def test_the_row_on_the_page_on_extending_is_a_row(tmp_path: Path) -> None:
    rows = pytest.importorskip("recipes.grids.rows").rows
    (block,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/extending.md").read_text(), flags=re.M | re.S)
    (tmp_path / "resnet26-cifar10.yaml").write_text(block)
    shutil.copytree(ROOT / "recipes/configs/trainer", tmp_path / "trainer")
    row = rows(tmp_path)["resnet26"]
    assert (row.title, row.data, row.epochs) == ("ResNet-26", "cifar10", 160)


def test_files_that_the_pages_name_exist() -> None:
    for page in ("docs/layout.md", "docs/extending.md", "CONTRIBUTING.md"):
        for path in re.findall(r"`((?:[\w.]+/)+[\w.]*|\w+\.py)`", (ROOT / page).read_text()):
            assert any((root / path).exists() for root in (ROOT, ROOT / "torch_meanfield")), f"{page}: {path}"


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in ("docs/layout.md", "docs/extending.md", "CONTRIBUTING.md"):
        for path in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / path).exists(), f"{page}: {path}"
