"""Residual networks of no library: nothing here is named as timm names it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class PaddedBlock(nn.Module):
    """He et al. 2016 for CIFAR, option A: relu(x + f(x)), the shortcut strided and padded with zero channels."""

    def __init__(self, a: int, b: int, stride: int = 1) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.n1, self.n2 = nn.BatchNorm2d(b), nn.BatchNorm2d(b)
        self.stride, self.extra = stride, b - a

    def forward(self, x):
        y = self.n2(self.second(F.relu(self.n1(self.first(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.extra))
        y += x
        return F.relu(y)


class CifarResNet(nn.Module):
    """Three groups of post-activation blocks."""

    def __init__(self, blocks: int = 3, width: int = 8) -> None:
        super().__init__()
        self.entry = nn.Conv2d(3, width, 3, padding=1)
        groups, a = [], width
        for g in range(3):
            b = width * 2**g
            groups.append(nn.Sequential(*(PaddedBlock(a if i == 0 else b, b, 2 if g and not i else 1)
                                          for i in range(blocks))))  # fmt: skip
            a = b
        self.groups = nn.ModuleList(groups)
        self.exit = nn.Linear(a, 10)

    def forward(self, x):
        x = F.relu(self.entry(x))
        for group in self.groups:
            x = group(x)
        return self.exit(x.mean((2, 3)))


class Layer(nn.Module):
    """x = attn(x) + x; x = mlp(x) + x."""

    def __init__(self, width: int, drop: float = 0.0) -> None:
        super().__init__()
        self.a, self.b = nn.LayerNorm(width), nn.LayerNorm(width)
        self.look = nn.MultiheadAttention(width, 2, batch_first=True)
        self.think = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(drop)
        )

    def forward(self, x):
        h = self.a(x)
        x = self.look(h, h, h, need_weights=False)[0] + x
        return self.think(self.b(x)) + x


class PlainViT(nn.Module):
    """A vision transformer as one writes it by hand."""

    def __init__(self, depth: int = 4, width: int = 16, drop: float = 0.0) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, width, 4, 4)
        self.where = nn.Parameter(torch.randn(1, 4, width) * 0.1)
        self.layers = nn.ModuleList(Layer(width, drop * i) for i in range(depth))
        self.out = nn.Linear(width, 10)

    def forward(self, x):
        x = self.cut(x).flatten(2).transpose(1, 2) + self.where
        for layer in self.layers:
            x = layer(x)
        return self.out(x.mean(1))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x):
        return x * self.excite(F.relu(self.squeeze(x.mean(1)))).sigmoid().unsqueeze(1)


class Ordinary(nn.Module):
    """``x + last(f(x))`` on ``(B, n, width)``, with a choice of what comes last."""

    def __init__(self, width: int = 6, kind: str = "linear", constant: float = 1.0) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)
        self.kind, self.constant = kind, constant
        self.extra = nn.Linear(width, width)
        self.gate = Gate(width)
        self.gain = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        h = self.outer(torch.tanh(self.inner(x * self.constant)))
        if self.kind == "silu":
            h = F.silu(h)
        elif self.kind == "relu":
            h = F.relu(h)
        elif self.kind == "gate":
            h = self.gate(h)
        elif self.kind == "gain":
            h = F.gelu(h) * self.gain
        elif self.kind == "sum":
            h = h + self.extra(x)
        elif self.kind == "minus":
            h = self.outer(torch.tanh(self.inner(x)) - x)
        elif self.kind == "shifted":
            h = h + 1.0
        return x + h


class Stack(nn.Module):
    """Blocks between two linear layers: ``(B, n, 6)`` to ``(B, n, 3)``."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 6)
        self.body = nn.Sequential(*blocks)
        self.leave = nn.Linear(6, 3)

    def forward(self, x):
        return self.leave(self.body(self.enter(x)))


def stack(n: int = 4, **kwargs) -> Stack:
    """n ordinary blocks."""
    return Stack(*(Ordinary(**kwargs) for _ in range(n)))


def tokens() -> torch.Tensor:
    """An input of a :class:`Stack`."""
    return torch.randn(2, 5, 6)


def images(n: int = 2) -> torch.Tensor:
    """Tiny images."""
    return torch.randn(n, 3, 8, 8)
