"""Checks of a release; docs/release.md has a line for each.

    python tools/release.py version          # the version, from its one place
    python tools/release.py consistent       # changelog, CITATION.cff and links agree with it and with setup.cfg
    python tools/release.py dist             # what lies in dist/: contents, sizes, and the wheel in a clean environment
    python tools/release.py address          # whether the project's address answers (needs a network)

The clean environment of ``dist`` holds torch, what torch requires, and the wheel: the packages are linked from the
environment that runs this, so that nothing is downloaded.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import importlib.metadata
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 1_000_000  # bytes of the wheel


class Failed(Exception):
    """A check that did not pass: what was found, and what to do."""


def version() -> str:
    """``__version__`` of the package, read without importing it."""
    tree = ast.parse((ROOT / "torch_meanfield/__init__.py").read_text())
    (found,) = (
        n.value.value
        for n in tree.body
        if isinstance(n, ast.Assign)
        and isinstance(n.value, ast.Constant)
        and ast.unparse(n.targets[0]) == "__version__"
    )
    return str(found)


def source() -> str:
    """The project's address, from its one place in setup.cfg."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return dict(re.findall(r"^(\w+) = (.*)$", config["metadata"]["project_urls"], flags=re.M))["Source"]


def consistent() -> str:
    """Changelog, citation and links against version and address."""
    now, address = version(), source()
    head = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    if head is None or not re.match(rf"(Unreleased|\[Unreleased\]|\[?{re.escape(now)}\]?)\b", head[1]):
        raise Failed(f"CHANGELOG.md begins with {head and head[1]!r}; name it Unreleased, or {now} with its date")
    citation = (ROOT / "CITATION.cff").read_text()
    if f"\nversion: {now}\n" not in citation:
        raise Failed(f"CITATION.cff names another version than {now}, that of torch_meanfield/__init__.py")
    user = address.removeprefix("https://github.com/").split("/")[0]
    for path in ("README.md", "CITATION.cff", ".github/ISSUE_TEMPLATE/config.yml"):
        for link in re.findall(r"https://(?:raw\.githubusercontent|github)\.com/[^\s)\"]+", (ROOT / path).read_text()):
            if "torch-meanfield" in link and f"/{user}/torch-meanfield" not in link:
                raise Failed(f"{path}: {link} is not at {address}, the Source of setup.cfg")
    return f"version {now}, address {address}: changelog, citation and links agree"


def address() -> str:
    """Whether the address answers."""
    try:
        with urllib.request.urlopen(source(), timeout=30) as answer:
            return f"{source()} answers {answer.status}"
    except (urllib.error.URLError, TimeoutError) as error:
        raise Failed(f"{source()} does not answer ({error}); put the right one into setup.cfg and README.md") from error


def dist() -> str:
    """Contents of the wheel, the same from the sdist as from the tree, and an installation in a clean environment."""
    (wheel,), (archive,) = ([*(ROOT / "dist").glob(pattern)] for pattern in ("*.whl", "*.tar.gz"))
    checked(wheel)
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, str(ROOT))
        (direct,) = Path(folder).glob("*.whl")
        if contents(direct) != contents(wheel):
            different = set(contents(direct).items()) ^ set(contents(wheel).items())
            raise Failed(
                f"the sdist builds another wheel than the tree: {sorted({name for name, _ in different})[:10]}"
            )
        told = installed_alone(wheel, Path(folder) / "env")
    sizes = ", ".join(f"{path.name} {path.stat().st_size / 1024:.0f} KB" for path in (wheel, archive))
    return f"{sizes}; {len(contents(wheel))} files, the same from sdist and tree; {told}"


def contents(wheel: Path) -> dict[str, int]:
    """Checksums by name. The record repeats them."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.CRC for info in archive.infolist() if not info.filename.endswith("/RECORD")}


def checked(wheel: Path) -> None:
    """The package and its metadata, all modules, the typing marker and the licence, and nothing else."""
    names = set(contents(wheel))
    info = f"torch_meanfield-{version()}.dist-info/"
    strangers = sorted(n for n in names if not n.startswith(("torch_meanfield/", info)))
    if strangers:
        raise Failed(f"{wheel.name} holds {strangers[:5]}; what is installed lies in torch_meanfield/")
    tree = {str(p.relative_to(ROOT)) for p in (ROOT / "torch_meanfield").rglob("*.py")}
    missing = sorted((tree | {"torch_meanfield/py.typed", f"{info}licenses/LICENSE"}) - names)
    if missing:
        raise Failed(f"{wheel.name} lacks {missing[:5]}; see [options.packages.find] in setup.cfg")
    if wheel.stat().st_size > LARGEST:
        raise Failed(f"{wheel.name} has {wheel.stat().st_size} bytes, more than {LARGEST}")


def installed_alone(wheel: Path, folder: Path) -> str:
    """Install into an environment with torch alone, import every room that promises to need no more, run the script."""
    venv.create(folder, with_pip=True)
    bin_, site = folder / "bin", next((folder / "lib").glob("python*/site-packages"))
    for path in torch_and_its_own():
        if not (site / path.name).exists():
            (site / path.name).symlink_to(path)
    python = str(bin_ / "python")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    run(python, "-m", "pip", "check")
    lazy = ["timm", "lightning", "matplotlib", "sklearn", "scipy"]
    rooms = "convert depth models observe particles record theory width command_line".split()
    program = (
        f"import importlib, sys; [importlib.import_module('torch_meanfield.' + r) for r in {rooms}]; "
        f"import torch_meanfield; assert not [n for n in {lazy} if n in sys.modules]; "
        "print(torch_meanfield.__version__, torch_meanfield.__file__)"
    )
    now, where = run(python, "-I", "-c", program).split()
    if now != version() or not Path(where).is_relative_to(site):
        raise Failed(f"the environment imports version {now} from {where}, not {version()} from the wheel")
    small = "torch_meanfield.convert.small_network:residual_network"
    run(str(bin_ / "torch-meanfield"), "report", small, "--input", "2,4")
    return "installs, imports and runs with torch alone"


def torch_and_its_own() -> Iterator[Path]:
    """What torch and the packages it requires have put into site-packages, recursively."""
    from packaging.requirements import Requirement

    todo, seen = ["torch"], set[str]()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        package = importlib.metadata.distribution(name)
        base = Path(str(package.locate_file("")))
        for top in {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}:
            yield base / top
        for line in package.requires or ():
            requirement = Requirement(line)
            extras = requirement.extras or {""}
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras)):
                todo += _with_extras(requirement)


def _with_extras(requirement: object) -> list[str]:
    """The package, and what its extras ask for (the parts of a CUDA toolkit are extras)."""
    from packaging.requirements import Requirement

    assert isinstance(requirement, Requirement)
    names = [requirement.name]
    for line in importlib.metadata.requires(requirement.name) or ():
        inner = Requirement(line)
        if inner.marker is not None and any(inner.marker.evaluate({"extra": e}) for e in requirement.extras):
            names.append(inner.name)
    return names


def run(*command: str) -> str:
    """What a command prints.

    Raises:
        Failed: it did not end with 0.
    """
    done = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir())
    if done.returncode:
        raise Failed(
            f"{' '.join(command)[:300]} ended with {done.returncode}:\n{done.stdout[-1500:]}{done.stderr[-1500:]}"
        )
    return done.stdout


COMMANDS: dict[str, Callable[[], str]] = {
    "version": version,
    "consistent": consistent,
    "dist": dist,
    "address": address,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks of a release.")
    parser.add_argument("check", choices=COMMANDS)
    try:
        print(COMMANDS[parser.parse_args().check]())
    except Failed as error:
        raise SystemExit(f"release.py: {error}") from None


if __name__ == "__main__":
    main()
