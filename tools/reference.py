"""Write docs/api/: a page for each room, with every name that its ``__init__.py`` makes public, and docs/api.md.

python tools/reference.py        # after a public name has come or gone; tests/test_docs.py compares
"""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {  # page: title, what it is, modules
    "particles": ("Particles", "Exchangeable particles, and the one operation that moves them.", ["particles"]),
    "depth": ("Depth", "Residual blocks with times: layers, networks, re-sorting.", ["depth", "models"]),
    "convert": ("Converting", "Existing backbones to stages, and back.", ["convert"]),
    "pruning": ("Pruning depth", "What each block is worth, and a network with fewer of them.", ["pruning"]),
    "width": ("Width", "Neurons that die and are born.", ["width"]),
    "record": ("Records and pictures", "For any training loop.", ["record"]),
    "lightning": ("Lightning", "Callbacks; `pip install 'torch-meanfield[lightning]'`.", ["lightning"]),
    "theory": ("Theory", "Predictions, and the diagnosis of a network.", ["theory"]),
    "command_line": ("Command line", "What `python -m torch_meanfield` runs.", ["command_line"]),
}


def public(module: str) -> list[str]:
    """What an ``__init__.py`` names: ``from ... import Name as Name``."""
    path = ROOT / module.replace(".", "/") / "__init__.py"
    found = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ImportFrom)]
    return [a.name for n in found for a in n.names if a.asname == a.name]


def pages() -> dict[str, str]:
    """The pages by their path in docs/."""
    home: dict[str, str] = {}
    seen: set[int] = set()
    written = {}
    for page, (title, text, modules) in ROOMS.items():
        lines = [f"# {title}", "", text, ""]
        for module in (f"torch_meanfield.{name}" for name in modules):
            for name in public(module):
                home.setdefault(name, page)
                thing = getattr(importlib.import_module(module), name)
                if id(thing) in seen:  # named in two rooms, described in the first
                    continue
                seen.add(id(thing))
                is_class = inspect.isclass(thing)
                lines += ["```{eval-rst}", f".. auto{'class' if is_class else 'function'}:: {module}.{name}"]
                lines += [*(["   :members:"] if is_class else []), "```", ""]
        written[f"api/{page}.md"] = "\n".join(lines).rstrip() + "\n"
    rows = [f"| `torch_meanfield.{n}` | [{ROOMS[home[n]][0]}](api/{home[n]}.md) |" for n in public("torch_meanfield")]
    head = ["# API reference", "", "Every public name. What stands in `torch_meanfield` itself:", "", "| name | room |"]
    toctree = ["```{toctree}", ":maxdepth: 1", "", *(f"api/{page}" for page in ROOMS), "```"]
    written["api.md"] = "\n".join([*head, "| --- | --- |", *rows, "", *toctree]) + "\n"
    return written


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(ROOT))
    for path, text in pages().items():
        (ROOT / "docs" / path).write_text(text)
