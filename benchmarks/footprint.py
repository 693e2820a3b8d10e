"""What it takes to use the package: bytes of its wheel, and lines that the README's examples add to a training.

    python benchmarks/footprint.py

The wheel is built by pip from this checkout, without its dependencies. The lines are those of the example that name
what the package gives: the import and the call. `tests/recipes/test_readme.py` executes these examples.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

if __package__ in (None, ""):  # run as a script: the checkout's packages are found beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import table, written
from recipes.record import provenance

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("BirthDeathOptimizer", "convert")
SOURCES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def wheel_bytes() -> int:
    """Size of the wheel of this checkout, built in a copy: what an older build left behind is not in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT / "torch_meanfield", copy / "torch_meanfield", ignore=shutil.ignore_patterns("*.pyc"))
        for name in SOURCES:
            shutil.copy(ROOT / name, copy)
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder]
        subprocess.run([*command, str(copy)], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        return wheel.stat().st_size


def added_lines(text: str, name: str) -> int:
    """Lines of the first Python example in ``text`` that calls ``name`` on which it is imported or called.

    Raises:
        ValueError: No example calls ``name``.
    """
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        if f"{name}(" in example:
            lines = [line for line in example.splitlines() if re.search(rf"\b{name}\b", line.partition("#")[0])]
            return len([line for line in lines if not line.startswith("print(")])
    raise ValueError(f"no Python example calls {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "footprint.json")
    args = parser.parse_args()
    readme = (ROOT / "README.md").read_text()
    lines = {name: added_lines(readme, name) for name in NAMES}
    size = wheel_bytes()
    print(table(("what", "figure"), [("wheel, bytes", size), *lines.items()]))
    written({**provenance(torch.device("cpu")), "wheel_bytes": size, "lines": lines}, args.out)


if __name__ == "__main__":
    main()
