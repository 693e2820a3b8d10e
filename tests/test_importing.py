"""``import torch_meanfield`` needs torch alone."""

import subprocess
import sys

import pytest

from torch_meanfield.importing import import_after


def test_the_package_imports_with_torch_alone():
    code = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec
hidden = {"timm", "torchvision", "lightning", "sklearn", "matplotlib", "pytest"}
PathFinder.find_spec = lambda name, path=None, target=None: (
    None if name.split(".")[0] in hidden else find(name, path, target)
)
import torch, torch_meanfield
model = torch_meanfield.MeanFieldResNet(8)
model(torch.randn(2, 3, 8, 8)).sum().backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
try:
    import timm
except ModuleNotFoundError:
    print("timm is hidden")
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out == "timm is hidden\n"


def test_importing_the_package_imports_none_of_its_extras():
    extras = {"timm", "lightning", "matplotlib", "torch._dynamo"}
    code = f"import sys, torch_meanfield; print({extras} & sys.modules.keys())"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "set()"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    (tmp_path / "host_pkg.py").write_text("value = 1\n")
    (tmp_path / "guest_pkg.py").write_text("import host_pkg\nhost_pkg.value += 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("host_pkg", "guest_pkg"):
        sys.modules.pop(name, None)


def test_the_guest_is_imported_after_its_host_and_not_before(packages):
    import_after("host_pkg", "guest_pkg")
    import_after("host_pkg", "guest_pkg")
    assert "host_pkg" not in sys.modules and "guest_pkg" not in sys.modules
    import host_pkg

    assert host_pkg.value == 2 and "guest_pkg" in sys.modules
    assert type(host_pkg.__loader__).__name__ == "SourceFileLoader" and host_pkg.__spec__.loader is host_pkg.__loader__


def test_a_host_that_is_there_already_gets_its_guest_at_once(packages):
    import host_pkg

    import_after("host_pkg", "guest_pkg")
    assert host_pkg.value == 2


def test_a_host_that_is_not_installed_fails_as_ever_and_may_come_later(packages, tmp_path):
    import_after("late_pkg", "guest_pkg")
    with pytest.raises(ModuleNotFoundError, match="late_pkg"):
        import late_pkg
    (tmp_path / "late_pkg.py").write_text("")
    import importlib

    importlib.invalidate_caches()
    import late_pkg  # noqa: F401

    assert "guest_pkg" in sys.modules
    sys.modules.pop("late_pkg")
