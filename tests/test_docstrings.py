"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import torch_meanfield

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(torch_meanfield.__path__, "torch_meanfield.")
    if not name.startswith("torch_meanfield.lightning")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    if name.endswith(".timm"):
        pytest.importorskip("timm")
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn})
    assert result.failed == 0


def test_the_layer_and_the_network_have_examples():
    for thing in (torch_meanfield.MeanFieldSequential, torch_meanfield.MeanFieldResNet):
        assert doctest.DocTestFinder().find(thing)[0].examples
