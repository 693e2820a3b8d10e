"""A vanilla tanh CNN of any depth: no skip connections, no normalisation, one convolution after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_meanfield.theory.isometry import delta_orthogonal_

CLASSES = 10


class DeepCNN(nn.Module):
    """``depth`` convolutions h -> conv3x3(tanh(h)) at one resolution, between a fixed input and a fixed read-out.

    Images are spread over the channels by a random orthonormal column of length ``sqrt(q)``, so that pre-activations
    begin with variance q; a random matrix reads the classes off the last ones, rescaled to variance 1. Neither is
    trained: whatever the network learns, its convolutions learn.

    Args:
        depth: Number of convolutions.
        channels: Number of channels of each.
        q: Variance of the first pre-activations for images of variance 1.
        size: Images are ``size`` x ``size``.
    """

    spread: Tensor
    read: Tensor

    def __init__(self, depth: int, channels: int, q: float, size: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(depth, channels, channels, 3, 3))
        column = F.normalize(torch.randn(channels), dim=0) * (q * channels) ** 0.5
        self.register_buffer("spread", column.view(1, channels, 1, 1))
        inputs = channels * size * size
        self.register_buffer("read", torch.randn(CLASSES, inputs) / (q * inputs) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = x * self.spread
        for weight in self.weight.unbind():  # one parameter for all layers: one tensor for the optimizer to step
            h = F.conv2d(h.tanh(), weight, padding=1)
        return h.flatten(1) @ self.read.T


def isometric_(model: DeepCNN, gain: float) -> None:
    """Delta-orthogonal weights."""
    for weight in model.weight.detach():
        delta_orthogonal_(weight, gain)


def he_(model: DeepCNN) -> None:
    """He et al. 2015: Gaussian weights of variance 2 / fan-in."""
    with torch.no_grad():
        fan_in = model.weight[0, 0].numel()
        model.weight.normal_(0, (2 / fan_in) ** 0.5)


def gradient_norms(model: DeepCNN, x: Tensor, y: Tensor) -> Tensor:
    """The norm of the loss's gradient in every convolution; ``(depth,)``."""
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    assert model.weight.grad is not None
    return model.weight.grad.double().flatten(1).norm(dim=1)


def train(
    model: DeepCNN, batch: Callable[[int], tuple[Tensor, Tensor]], steps: int, lr: float, momentum: float = 0.9
) -> list[float]:
    """SGD on ``batch(step)``; the loss at every step, and no more steps once it is not finite."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch(step)[0]), batch(step)[1])
        losses.append(loss.item())
        if not loss.isfinite():
            break
        loss.backward()
        optimizer.step()
    return losses
