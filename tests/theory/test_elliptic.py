"""Elliptic equations on the cube: closed-form features against automatic differentiation, and solved equations."""

import math

import pytest
import torch

from recipes.theory.pde import OPERATOR, collocation, linear_rate, solution, solve
from tests.theory.jacobians import full_jacobian
from torch_meanfield.theory.elliptic import BoundaryNet, Collocation, EllipticOperator, bubble


def points(n, d):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_operator_on_a_function_with_known_derivatives():
    """u = x^2 y: gradient (2xy, x^2), second derivatives (2y, 2x; 2x, 0)."""
    x = points(4, 2)
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    operator = EllipticOperator(lambda x: a.expand(len(x), 2, 2), lambda x: x, lambda x: x[:, 1])
    s, t = x.T
    wanted = 2 * 2 * t + 2 * 0.5 * 2 * s + s * 2 * s * t + t * s**2 + t * s**2 * t
    torch.testing.assert_close(operator(lambda p: p[0] ** 2 * p[1], x), wanted)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_the_features_are_those_of_automatic_differentiation(d):
    problem, net = collocation(d, 7, seed=0), BoundaryNet(d, 6, generator=torch.Generator().manual_seed(1))
    residual = problem.features(net) @ net.a
    torch.testing.assert_close(residual, OPERATOR(net.forward, problem.x))
    assert problem.risk(net).item() == pytest.approx(((residual - problem.f).square().sum() / 14).item())


def test_the_right_hand_side_is_that_of_the_solution_in_one_dimension():
    """u = e^x sin(pi x): u' = e^x (sin + pi cos), u'' = e^x ((1 - pi^2) sin + 2 pi cos)."""
    problem = collocation(1, 9, seed=0)
    x = problem.x[:, 0]
    sin, cos, e = (math.pi * x).sin(), (math.pi * x).cos(), x.exp()
    a = 1 + x.square() / 2 + x.cos().square() / 4
    f = e * (a * ((1 - math.pi**2) * sin + 2 * math.pi * cos) + sin * (sin + math.pi * cos) - (1 + x) * sin)
    torch.testing.assert_close(problem.f, f)


def test_the_boundary_condition_is_built_in():
    net = BoundaryNet(3, 20)
    x = points(10, 3)
    x[:, 1] = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(5)
    assert not net(x).any() and not bubble(x).any() and solution(x).abs().max() < 1e-12
    assert bubble(torch.full((3,), 0.5)) == 1


@pytest.mark.parametrize(("d", "iterations"), [(1, 100), (2, 100)])
def test_a_network_solves_it(d, iterations):
    net, curve = solve(d, seed=0, iterations=iterations)
    assert curve[0][2] > 0.3 and curve[-1][2] < 1e-2
    x = points(200, d)
    assert (net(x) - solution(x)).norm() < 1e-2 * solution(x).norm()


def test_five_dimensions():
    _, curve = solve(5, seed=0, iterations=30)
    assert curve[-1][2] < 0.05  # the recipe takes 400 iterations, to 1e-3


def test_gradient_descent_stays_under_the_linear_rate():
    found = linear_rate(n=4, width=1024, steps=1500)
    losses, bound = torch.tensor(found["losses"]), torch.tensor(found["bound"])
    assert (losses <= bound * (1 + 1e-9)).all() and bound[-1] < 0.1 * bound[0]


def test_the_gram_matrix_is_the_kernel_of_the_output_weights():
    problem, net = collocation(2, 5, seed=0), BoundaryNet(2, 8)

    class Residual(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(net.a.detach())

        def forward(self, rows):
            return rows @ self.a

    jacobian = full_jacobian(Residual(), problem.features(net).detach())
    torch.testing.assert_close(8 * problem.outer_gram(net), jacobian @ jacobian.T)


def test_bad_arguments():
    x = points(3, 2)
    good = {"a": OPERATOR.a, "b": OPERATOR.b, "c": OPERATOR.c}
    eye = torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    cases = (
        ({"a": lambda x: -eye}, "not elliptic"),
        ({"a": lambda x: eye + eye.new_tensor([[0.0, 1.0], [0.0, 0.0]])}, "not elliptic"),
        ({"a": lambda x: x}, "coefficient a must be"),
        ({"b": lambda x: x[:, 0]}, "coefficient b must be"),
        ({"c": lambda x: x}, "coefficient c must be"),
    )
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            Collocation(EllipticOperator(**(good | change)), x, torch.zeros(3))
    with pytest.raises(ValueError, match="f must be"):
        Collocation(OPERATOR, x, torch.zeros(2))
    with pytest.raises(ValueError, match="points"):
        OPERATOR(solution, x[0])
    for change, message in (({"dim": 0}, "dim and width"), ({"output_scale": -1.0}, "output_scale")):
        with pytest.raises(ValueError, match=message):
            BoundaryNet(**({"dim": 1, "width": 2} | change))
