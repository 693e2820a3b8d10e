"""The checks of a release notice what they are for."""

import zipfile

import pytest

import torch_meanfield
from tools import release

INFO = f"torch_meanfield-{torch_meanfield.__version__}.dist-info"


@pytest.fixture
def wheel(tmp_path):
    """Pack a wheel of all modules, without some files, with others."""

    def pack(without=(), extra=()):
        names = [str(p.relative_to(release.ROOT)) for p in (release.ROOT / "torch_meanfield").rglob("*.py")]
        names += ["torch_meanfield/py.typed", f"{INFO}/licenses/LICENSE", f"{INFO}/RECORD", *extra]
        path = tmp_path / "torch_meanfield.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name in sorted(set(names) - set(without)):
                archive.writestr(name, name)
        return path

    return pack


def test_the_version_is_the_packages():
    assert release.version() == torch_meanfield.__version__


def test_a_whole_wheel_passes_and_its_record_is_not_compared(wheel):
    release.checked(wheel())
    assert f"{INFO}/RECORD" not in release.contents(wheel())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"without": ("torch_meanfield/py.typed",)}, "py.typed"),
        ({"without": ("torch_meanfield/depth/sorting.py",)}, "depth/sorting.py"),
        ({"without": (f"{INFO}/licenses/LICENSE",)}, "LICENSE"),
        ({"extra": ("recipes/demo.py",)}, "recipes/demo.py"),
    ],
)
def test_a_wheel_that_lacks_a_file_or_holds_a_stranger_fails_by_its_name(wheel, change, word):
    with pytest.raises(release.Failed, match=word):
        release.checked(wheel(**change))


def test_a_large_wheel_fails(wheel, monkeypatch):
    monkeypatch.setattr(release, "LARGEST", 1000)
    with pytest.raises(release.Failed, match="more than 1000"):
        release.checked(wheel())


def test_another_version_in_the_citation_fails(monkeypatch):
    monkeypatch.setattr(release, "version", lambda: "9.9.9")
    with pytest.raises(release.Failed, match="9.9.9"):
        release.consistent()


def test_a_link_to_another_address_fails(monkeypatch):
    monkeypatch.setattr(release, "source", lambda: "https://github.com/somebody/torch-meanfield")
    with pytest.raises(release.Failed, match="README.md"):
        release.consistent()


def test_torch_brings_what_it_requires_and_no_extra_of_ours():
    names = {path.name for path in release.torch_and_its_own()}
    assert {"torch", "sympy", "networkx"} <= names and not names & {"timm", "lightning", "matplotlib", "numpy"}


def test_a_command_that_fails_is_told_with_what_it_said():
    with pytest.raises(release.Failed, match="ended with 3"):
        release.run("python3", "-c", "import sys; sys.exit(3)")
