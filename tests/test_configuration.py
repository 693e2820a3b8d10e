"""What pyproject.toml and the Makefile name exists."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is new in Python 3.11")
def test_every_path_of_the_mutation_tests_exists():
    import tomllib

    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutmut"]
    named = ("source_paths", "only_mutate", "also_copy", "pytest_add_cli_args_test_selection")
    paths = [path for option in named for path in options[option]]
    assert len(paths) > 40
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_script_and_folder_of_the_makefile_exists():
    scripts = re.findall(r"\b(?:recipes|benchmarks|tools)/[\w/]+\.py", MAKEFILE)
    (sources,) = re.findall(r"^SOURCES := (.*)$", MAKEFILE, flags=re.M)
    assert "tools/soak.py" in scripts and "tools" in sources.split()
    assert [path for path in (*scripts, *sources.split()) if not (ROOT / path).exists()] == []


def test_the_whole_check_asks_for_targets_that_the_makefile_has():
    (targets,) = re.findall(r"^for target in (.*); do$", (ROOT / ".ci" / "run").read_text(), flags=re.M)
    assert targets.split() == ["install", "test", "lint", "format-check", "types", "demo"]
    assert all(re.search(rf"^{target}:", MAKEFILE, flags=re.M) for target in targets.split())
