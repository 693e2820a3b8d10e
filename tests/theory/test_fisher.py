"""Statistics of the Fisher information: closed forms, networks of width 1,000, whole matrices."""

import math

import pytest
import torch
from torch import nn

from recipes.theory.fisher import SETTINGS, compare, loss_ratio
from tests.theory.jacobians import full_jacobian
from torch_meanfield.theory.fisher import measured_fisher, predicted_fisher


def test_a_linear_network_in_closed_form():
    """q~ = q^ = 1 for sigma_w = 1, sigma_b = 0: T_1 = sum (M + 1), and T_2 = 3 as only biases are shared."""
    widths = [200, 300, 400, 5]
    found = predicted_fisher(lambda u: u.clone(), widths, 1.0, samples=50)
    parameters = 201 * 300 + 301 * 400 + 401 * 5
    own, shared = 201 + 301 + 401, 3
    assert found.mean == pytest.approx(5 * own / parameters)
    assert found.largest == pytest.approx(0.98 * shared + 0.02 * own, rel=1e-6)
    assert found.second_moment == pytest.approx(5 * (0.98 * shared**2 + 0.02 * own**2) / parameters, rel=1e-6)
    assert found.critical_learning_rate == 2 / found.largest


def test_relu_with_arc_cosines():
    """One hidden layer: q^_2 and q~_2 are arc-cosine kernels of the correlation sigma_b^2 / (sigma_w^2 + sigma_b^2)."""
    m, sw2, sb2 = 1000, 2.0, 0.5
    found = predicted_fisher(torch.relu, [m, m, 1], sw2**0.5, sb2**0.5, samples=10**9)
    q, theta = sw2 + sb2, math.acos(sb2 / (sw2 + sb2))
    product = q * (math.sin(theta) + (math.pi - theta) * math.cos(theta)) / (2 * math.pi)
    slope = sw2 * (math.pi - theta) / (2 * math.pi)
    assert found.largest == pytest.approx(slope + m * product + 1, rel=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_networks_of_width_1000_within_10_percent(name):
    _, ratios = compare(name, 1000, outputs=1, networks=12, seed=0)
    assert (ratios.mean(0) - 1).abs().max() < 0.1


def test_the_learning_rate_it_allows():
    assert loss_ratio("tanh", 500, 0.8, seed=0) < 1
    assert loss_ratio("tanh", 500, 1.3, seed=0) > 100


def test_the_dual_has_the_eigenvalues_of_the_matrix():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double(), torch.randn(6, 4).double()
    jacobian = full_jacobian(model, x)
    eigenvalues = torch.linalg.eigvalsh(jacobian.T @ jacobian / 6)
    found = measured_fisher(model, x)
    assert found.mean == pytest.approx(eigenvalues.mean().item())
    assert found.second_moment == pytest.approx(eigenvalues.square().mean().item())
    assert found.largest == pytest.approx(eigenvalues[-1].item())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": [10, 1]}, "widths"),
        ({"widths": [10, 0, 1]}, "widths"),
        ({"sigma_w": -1.0}, "sigma_w"),
        ({"input_variance": math.inf}, "input_variance"),
        ({"samples": 0}, "samples"),
        ({"activation": lambda u: u.softmax(-1)}, "element-wise"),
    ],
)
def test_bad_arguments(change, message):
    good = {"activation": torch.tanh, "widths": [10, 10, 1], "sigma_w": 1.0, "samples": 5}
    with pytest.raises(ValueError, match=message):
        predicted_fisher(**(good | change))
