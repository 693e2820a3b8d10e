"""What is said of numbers that no small network shows by itself."""

import math

import pytest
import torch

from torch_meanfield.theory.diagnosis.advise import advise
from torch_meanfield.theory.diagnosis.parts import SKIP, Kernel, Layer

NO_KERNEL = Kernel(0, torch.empty(0, dtype=torch.float64), "not asked for")


def layers(*gradients, **kwargs):
    """Layers that are well but for their gradients, and a last one."""
    return [
        Layer(f"layer{i}", "Linear", q=1.0, correlation=0.5, gradient=g, **kwargs)
        for i, g in enumerate((*gradients, 1.0))
    ]


def said(found, kernel=NO_KERNEL, loss=1.0):
    return [str(finding) for finding in advise(found, [], kernel, loss)]


def test_nothing_is_said_of_a_network_that_is_well():
    assert said(layers(1.0, 1.0, 1.0)) == []
    assert said(layers(0.0, 1.0)) == []  # two layers tell no trend


def test_gradients_that_are_not_finite_come_before_all_else():
    (finding,) = said(layers(math.inf, math.inf, 1.0, critical_gain=0.5))
    assert finding.startswith("layer1: the gradient is not finite from here back to the input")
    (finding,) = said([*layers(math.nan, math.nan)[:2]])  # nowhere is one known
    assert finding.startswith("layer1: the gradient is not finite")
    assert said(layers(math.nan, 1.0, 1.0)) == []  # a layer that the loss does not reach


def test_a_loss_that_is_not_finite_by_itself():
    (finding,) = said(layers(1.0, 1.0, 1.0), loss=math.nan)
    assert finding.startswith("loss: it is not finite although every layer's output is")


def test_layers_that_no_gradient_reaches_are_named():
    (finding,) = said(layers(0.0, 0.0, 1.0))
    assert finding.startswith("layer0 .. layer1: no gradient arrives at all")
    assert "edge of chaos (theory.critical)" in finding  # no gain is known that would help
    (finding,) = said(layers(1.0, 1.0, 0.0))
    assert "gradients explode by a factor inf" in finding


def test_where_there_is_a_residual_stream_it_is_compared_along_the_stream():
    stream = [Layer(f"sum{i}", SKIP, 1.0, 0.5, g) for i, g in enumerate((1e4, 1e2, 1.0))]
    (finding,) = said([*layers(1.0, 1.0, 1.0), *stream])
    assert finding.startswith("sum0 .. sum2: gradients explode by a factor 1e+04 going back, 1e+04 a layer")


def test_a_unit_that_everything_hangs_on():
    found = [
        *layers(1.0, 1.0, 1.0, potential_extreme=3.0),
        Layer("odd", "Linear", 1.0, 0.5, 1.0, potential_extreme=40.0),
    ]
    (finding,) = said(found)
    assert finding.startswith("odd: one of the units it reads has a potential 40 deviations from the others'")


@pytest.mark.parametrize(
    ("eigenvalues", "expected"),
    [([1e-8, 1.0], "for about 1e+08 steps"), ([0.0, 1.0], "at all"), ([0.0, 0.0], "at all"), ([1e-3, 1.0], None)],
)
def test_inputs_that_the_kernel_cannot_tell_apart(eigenvalues, expected):
    found = said(layers(1.0, 1.0, 1.0), Kernel(2, torch.tensor(eigenvalues, dtype=torch.float64)))
    assert (found == []) if expected is None else f"cannot tell some inputs apart {expected};" in found[0]
