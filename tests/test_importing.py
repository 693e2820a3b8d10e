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


def test_importing_the_package_imports_none_of_its_extras():
    extras = {"timm", "lightning", "matplotlib", "torch._dynamo"}
    code = f"import sys, torch_meanfield; print({extras} & sys.modules.keys())"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "set()"
