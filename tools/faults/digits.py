"""A small training in which everything moves: re-sorts, births, an average, a schedule, and chance in each step."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torch_meanfield import BirthDeathOptimizer, MeanFieldSequential

BLOCKS, WIDTH, UNITS, IMAGES, BATCH = 4, 16, 24, 256, 32
EVERY = 4  # steps from one birth event to the next
EXAMPLE = torch.linspace(-1, 1, 2 * 64).view(2, 64)


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """Images ``(IMAGES, 64)`` in 0..1 and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data[:IMAGES] / 16, dtype=torch.float32), torch.tensor(data.target[:IMAGES])


class Net(nn.Module):
    """A residual stack whose blocks stand close together, and a hidden layer whose units are replaced."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()

        def block() -> nn.Module:
            return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(dropout))

        self.stem = nn.Linear(64, WIDTH)
        self.stack = MeanFieldSequential(*(block() for _ in range(BLOCKS)), horizon=1.0)
        self.hidden, self.last = nn.Linear(WIDTH, UNITS), nn.Linear(UNITS, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(self.stack(self.stem(x))).relu())

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Of a batch, pushing the blocks about and holding them together so that they change places every few steps."""
        noise, tau = torch.randn(images.shape, generator=generator), self.stack.tau
        push = (tau * torch.randn(tau.shape, generator=generator)).sum() + (tau - 0.6).square().sum()
        return F.cross_entropy(self(images + 0.1 * noise), labels) + push


def optimizer_of(
    net: Net, inner: type[torch.optim.Optimizer] = torch.optim.AdamW, steep: bool = True, **options: Any
) -> Any:
    """An optimizer that moves tau fast and replaces units at each event, dead or not."""
    fast = [net.stack.tau_axis.offset]
    slow = [p for p in net.parameters() if p is not fast[0]]
    optimizer = inner([{"params": slow, "lr": 3e-3}, {"params": fast, "lr": 0.2}], **options)
    settings: dict[str, Any] = {"every": EVERY, "reinject": 0.1, "candidates": 16, "threshold": 0.1, "steep": steep}
    return BirthDeathOptimizer(optimizer, net, example_input=EXAMPLE, **settings)


def average_of(model: nn.Module) -> AveragedModel:
    """An exponential average of ``model`` with its buffers."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Where two nested states differ in type, shape, dtype or in any bit."""
    if type(a) is not type(b) and not (isinstance(a, dict) and isinstance(b, dict)):
        return [f"{name}: {type(a).__name__} against {type(b).__name__}"]
    if isinstance(a, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
        return [] if same else [f"{name}: {tuple(a.shape)} {a.dtype}"]
    if isinstance(a, dict):
        out = [f"{name}: keys {a.keys() ^ b.keys()}"] if a.keys() != b.keys() else []
        return out + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, (list, tuple)):
        out = [f"{name}: {len(a)} against {len(b)} entries"] if len(a) != len(b) else []
        return out + [d for i, (x, y) in enumerate(zip(a, b, strict=False)) for d in differences(x, y, f"{name}.{i}")]
    return [] if a == b or (a != a and b != b) else [f"{name}: {a!r} against {b!r}"]


def _bits(t: Tensor) -> Tensor:
    """So that -0.0 is not 0.0 and nan is nan."""
    return t.contiguous().reshape(-1).view(torch.uint8)
