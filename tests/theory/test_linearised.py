"""Training in the tangent plane, against steps taken one by one and against trained networks."""

import math

import pytest
import torch

from recipes.theory.ntk import deviation, linear_rate
from torch_meanfield.theory.linearised import LinearisedTraining, linear_rate_bound


def problem(n=6, k=2):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n * k, 8, generator=generator, dtype=torch.float64)  # rank 8 < 12: some of K is 0
    other = torch.randn(3 * k, 8, generator=generator, dtype=torch.float64)
    outputs, targets = (torch.randn(n, k, generator=generator, dtype=torch.float64) for _ in range(2))
    return features, other, outputs, targets


def test_descent_of_a_linear_model_step_by_step():
    features, other, outputs, targets = problem()
    rate, n = 0.1, len(outputs)
    training = LinearisedTraining(features @ features.T, outputs, targets, learning_rate=rate)
    theta = torch.zeros(8, dtype=torch.float64)
    for step in range(20):
        error = outputs.flatten() + features @ theta - targets.flatten()
        torch.testing.assert_close(training.outputs_at(step), (outputs.flatten() + features @ theta).view(n, 2))
        assert training.loss_at(step) == pytest.approx((error.square().sum() / (2 * n)).item())
        start = torch.ones(3, 2)
        predicted = training.predict(step, other @ features.T, start)
        torch.testing.assert_close(predicted, start + (other @ theta).view(3, 2), check_dtype=False)
        theta -= rate * features.T @ error / n


def test_the_flow_is_the_limit_of_small_steps():
    features, other, outputs, targets = problem()
    kernel, cross = features @ features.T, other @ features.T
    flow = LinearisedTraining(kernel, outputs, targets)
    descent = LinearisedTraining(kernel, outputs, targets, learning_rate=1e-5)
    torch.testing.assert_close(flow.outputs_at(0.7), descent.outputs_at(70_000), rtol=1e-3, atol=1e-3)
    start = torch.zeros(3, 2)
    late = flow.predict(0.7, cross, start)
    torch.testing.assert_close(late, descent.predict(70_000, cross, start), rtol=1e-3, atol=1e-3)


def test_a_trained_network_stays_under_the_linear_rate():
    found = linear_rate(512, seed=0)
    losses, bound = torch.tensor(found["losses"]), torch.tensor(found["bound"])
    assert (losses <= bound * (1 + 1e-9)).all() and losses[-1] < 0.02 * losses[0]
    assert bound[-1] < 0.02 * bound[0]


def test_the_linearisation_approaches_a_trained_network_as_the_width_grows():
    narrow, wide = (sum(deviation(width, seed)[0] for seed in range(2)) / 2 for width in (64, 1024))
    assert wide < 0.08 and 2.5 < narrow / wide < 7  # sqrt(16) = 4


def test_bad_arguments():
    eye = torch.eye(2)
    with pytest.raises(ValueError, match=r"kernel must be \(2, 2\)"):
        LinearisedTraining(torch.eye(3), torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="outputs and targets"):
        LinearisedTraining(eye, torch.ones(2), torch.ones(2, 1))
    with pytest.raises(ValueError, match="symmetric"):
        LinearisedTraining(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="learning_rate"):
        LinearisedTraining(eye, torch.ones(2), torch.ones(2), learning_rate=0.0)
    training = LinearisedTraining(eye, torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="time"):
        training.loss_at(-1.0)
    with pytest.raises(ValueError, match="cross_kernel"):
        training.predict(1.0, eye[:1], torch.ones(2))
    good = {"loss": 1.0, "width": 10, "smallest_eigenvalue": 0.1, "samples": 5}
    assert linear_rate_bound(torch.tensor([5.0]), **good).item() == pytest.approx(math.exp(-1.0))
    for name, value in (("loss", -1.0), ("width", 0), ("samples", 0), ("smallest_eigenvalue", math.nan)):
        with pytest.raises(ValueError, match=name):
            linear_rate_bound(torch.ones(1), **(good | {name: value}))
