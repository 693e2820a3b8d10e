"""How deep a plain network can be and still learn: MLPs of growing depth on 8x8 digits, a few steps each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from recipes.theory.stacks import digits

WIDTH, BATCH, LEARNT = 64, 64, 0.5  # a network has learnt when it names this share of the digits right; chance is 0.1


def mlp(depth: int, layer: Callable[[int, int], nn.Module], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """``depth`` hidden layers made by ``layer(inputs, outputs)``, and a plain read-out."""
    modules: list[nn.Module] = []
    for _ in range(depth):
        modules += [layer(WIDTH, WIDTH), activation()]
    read = nn.Linear(WIDTH, 10)
    nn.init.normal_(read.weight, std=WIDTH**-0.5)
    return nn.Sequential(nn.Flatten(), *modules, read)


def accuracy(make: Callable[[], nn.Module], steps: int, lrs: Sequence[float], seed: int) -> float:
    """Share of the digits named right after ``steps`` of Adam: at the best of the learning rates."""
    images, labels = digits(1797), torch.from_numpy(load_digits().target)
    best = 0.0
    for lr in lrs:
        torch.manual_seed(seed)
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        for index in torch.randint(len(images), (steps, BATCH)):
            optimizer.zero_grad()
            F.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
        with torch.no_grad():
            best = max(best, float((model(images).argmax(1) == labels).float().mean()))
    return best


def deepest(depths: Sequence[int], accuracies: Sequence[float]) -> int:
    """The largest depth up to which all networks learnt; 0 if the shallowest did not."""
    found = 0
    for depth, value in zip(depths, accuracies, strict=True):
        if value < LEARNT:
            break
        found = depth
    return found
