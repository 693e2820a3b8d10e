"""Residual stacks of the depth wing, measured: lengths, correlations and gradients before every branch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from torch_meanfield import MeanFieldResNet, MeanFieldSequential


def linear_stack(
    activation: Callable[[Tensor], Tensor], n: int, width: int, horizon: float, sigma_w: float, sigma_v: float = 1.0
) -> MeanFieldSequential:
    """n branches V phi(W x) with weights N(0, sigma^2 / width), from torch's random state."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(width, width) * sigma_w / width**0.5)
            self.v = nn.Parameter(torch.randn(width, width) * sigma_v / width**0.5)

        def forward(self, x: Tensor) -> Tensor:
            return activation(x @ self.w.T) @ self.v.T

    return MeanFieldSequential(*(Branch() for _ in range(n)), horizon=horizon)


def digits(count: int) -> Tensor:
    """The first ``count`` 8x8 digits, of mean 0 and variance 1; ``(count, 1, 8, 8)``."""
    images = torch.from_numpy(load_digits().images).float()
    return ((images - images.mean()) / images.std())[:count, None]


def resnet_stage(n: int, horizon: float | None, batch: int) -> tuple[MeanFieldSequential, Tensor]:
    """The n particles of the first stage of a ``MeanFieldResNet``, and the stem's view of ``batch`` digits."""
    model = MeanFieldResNet(6 * n + 2, in_chans=1, horizon=horizon)
    with torch.no_grad():
        return model.mean_field_layers()["stage1.particles"], model.stem(digits(batch))


def padding_share(size: int, kernel: int = 3) -> float:
    """The share of a convolution's taps that lie inside a ``size`` x ``size`` image, zeros around it."""
    outside = 2 * sum(range(1, kernel // 2 + 1))
    return (1 - outside / (kernel * size)) ** 2


def measure_stack(layer: MeanFieldSequential, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p, gamma and squared gradient norms at X^0 .. X^n, of a random linear loss; float64 ``(n + 1,)`` each.

    gamma is the mean product of two different inputs. In images it is what batch norm leaves out: p less the variance
    of a channel over batch and positions (their harmonic mean over channels, since gradients are divided by it).
    """
    seen = [x.detach().requires_grad_()]
    for branch, step in zip(layer, layer.steps().detach(), strict=True):
        seen.append(seen[-1] + step * branch(seen[-1]))
        seen[-1].retain_grad()
    assert torch.allclose(seen[-1], layer(seen[0]), rtol=1e-3, atol=1e-4)
    (seen[-1] * torch.randn_like(x)).sum().backward()
    p = [t.detach().double().square().mean() for t in seen]
    products = [_product(t.detach().double()) for t in seen]
    gradients = [t.grad.double().square().sum() for t in seen if t.grad is not None]
    return torch.stack(p), torch.stack(products), torch.stack(gradients)


def _product(x: Tensor) -> Tensor:
    if x.ndim == 4:
        return x.square().mean() - 1 / (1 / x.transpose(0, 1).flatten(1).var(1, correction=0)).mean()
    n = len(x)
    return (x.sum(0).square().mean() - x.square().sum(0).mean()) / (n * (n - 1))
