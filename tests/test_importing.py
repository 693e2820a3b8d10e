"""``import torch_meanfield`` needs torch alone."""

import subprocess
import sys


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


def test_what_needs_another_package_names_the_extra_to_install():
    code = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, path=None, target=None: (
    None if name.split(".")[0] in {"timm", "lightning", "matplotlib"} else find(name, path, target)
)
import importlib
import torch
from torch_meanfield.theory import diagnose

net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
wanted = [lambda n=n: importlib.import_module("torch_meanfield." + n) for n in ("lightning", "models.timm")]
for need in (*wanted, diagnose(net, torch.randn(4, 3)).plot):
    try:
        need()
    except ImportError as error:
        print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line.split("pip install ")[1] for line in out] == [
        f"'torch-meanfield[{extra}]'" for extra in ("lightning", "timm", "plot")
    ]


def test_importing_the_package_imports_none_of_its_extras():
    extras = {"timm", "lightning", "matplotlib", "torch._dynamo"}
    code = f"import sys, torch_meanfield; print({extras} & sys.modules.keys())"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "set()"


def test_the_names_that_modules_of_particles_had_in_0_1_still_work():
    code = """
import torch_meanfield.particles.rows
from torch_meanfield.particles import eagerly, no_compile
from torch_meanfield.particles.rows import write_rows_
from torch_meanfield.particles.eagerly import eagerly as decorator
assert write_rows_ is torch_meanfield.particles.slices.write_rows_ is torch_meanfield.particles.rows.write_rows_
assert decorator is no_compile.eagerly is eagerly.eagerly
"""
    subprocess.run([sys.executable, "-c", code], check=True)
