"""A training with re-sorts and births in it, with and without the tools that people use beside it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.faults.digits import BATCH, BLOCKS, EXAMPLE, UNITS, WIDTH, digits
from torch_meanfield import BirthDeathOptimizer, MeanFieldSequential, conversion_report, convert, subscribe

Forward = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """Both wings: residual blocks with hidden units of their own, close together in time, and a hidden layer."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = lambda block: block) -> None:
        super().__init__()
        torch.manual_seed(0)

        def block() -> nn.Module:
            return wrap(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, WIDTH)))

        self.stem = nn.Linear(64, WIDTH)
        self.stack = MeanFieldSequential(*(block() for _ in range(BLOCKS)), horizon=1.0)
        self.hidden = nn.Sequential(nn.Linear(WIDTH, UNITS), nn.ReLU(), nn.Linear(UNITS, 10))

    def parts(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """What ``forward`` calls, in order; the blocks are in the second."""
        return self.stem, self.stack, self.hidden

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts():
            x = part(x)
        return x


class Block(nn.Module):
    """A residual block as other people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Converted(Net):
    """The same as a plain network that was converted."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        torch.manual_seed(0)
        self.stem, self.blocks = nn.Linear(64, WIDTH), nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.hidden = nn.Sequential(nn.Linear(WIDTH, UNITS), nn.ReLU(), nn.Linear(UNITS, 10))
        convert(self, EXAMPLE, horizon=1.0)

    @property
    def stack(self) -> Any:
        return conversion_report(self).stages[0].module

    def parts(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.stem, self.blocks, self.hidden


@dataclass
class Trained:
    """What became of a training.

    Args:
        ending: parameters, buffers and optimizer state.
        resorts: times blocks changed places.
        born: units drawn anew.
        batches: samples in a step, as counted at each event.
        recorded: passes recorded around each population at each event.
    """

    ending: dict[str, Any] = field(repr=False)
    resorts: int
    born: int
    batches: list[float | None]
    recorded: list[list[int]]


def optimizer_of(net: Any, inner: Any = torch.optim.SGD, tau_lr: float = 0.1, **settings: Any) -> BirthDeathOptimizer:
    """Tau learns fast, and a tenth of the units is replaced at every event, placed where the loss is steep."""
    fast = net.stack.tau_axis.offset
    slow = [p for p in net.parameters() if p is not fast]
    options = {"momentum": 0.9} if inner is torch.optim.SGD else {}
    wrapped = inner([{"params": slow, "lr": 0.02}, {"params": [fast], "lr": tau_lr}], **options)
    chosen: dict[str, Any] = {"every": 6, "reinject": 0.1, "candidates": 16, "threshold": 1e9, **settings}
    return BirthDeathOptimizer(wrapped, net, example_input=EXAMPLE.to(fast), **chosen)


def train(
    net: Any,
    optimizer: Any,
    *,
    forward: Forward | None = None,
    backward: Callable[[Tensor, Tensor, int], None] | None = None,
    after: Callable[[], None] = lambda: None,
    steps: int = 18,
    micro: int = 1,
    before_step: Callable[[], None] = lambda: None,
) -> Trained:
    """Train ``net`` on digits; the same pushes on its times in every training.

    Args:
        forward: what is called instead of ``net``.
        backward: makes the gradients of a batch instead of ``loss.backward()``, from images, classes and the number
            of parts the batch has.
        after: called after every step.
        steps: optimizer steps.
        micro: parts of each batch whose gradients are accumulated.
        before_step: called when the gradients are there.
    """
    forward = net if forward is None else forward
    images, labels = digits()
    anchor = net.stack.tau_axis.anchor
    images, labels = images.to(anchor), labels.to(anchor.device)
    resorts: list[Any] = []
    events: list[Any] = []
    batches: list[float | None] = []
    recorded: list[list[int]] = []
    dynamics = optimizer._dynamics
    size, event = dynamics.batch.size, dynamics.event

    def look(*args: Any) -> Any:
        batches.append(size())
        recorded.append([len(r.gradients) for r in dynamics.recorders])
        return event(*args)

    with ExitStack() as stack:
        stack.enter_context(subscribe(lambda m: resorts.append(m) if m.cause == "resort" else None, model=net))
        stack.enter_context(optimizer.register_event_hook(events.append))
        dynamics.event = look
        stack.callback(delattr, dynamics, "event")
        for step in range(steps):
            optimizer.zero_grad()
            at = step % 8 * BATCH
            for x, y in zip(images[at : at + BATCH].chunk(micro), labels[at : at + BATCH].chunk(micro), strict=True):
                if backward is None:
                    (F.cross_entropy(forward(x), y) / micro).backward()
                else:
                    backward(x, y, micro)
            offset = net.stack.tau_axis.offset
            offset.grad += torch.randn(BLOCKS, generator=torch.Generator().manual_seed(step)).to(offset)
            before_step()
            optimizer.step()
            after()
    ending = {"model": net.state_dict(), "state": optimizer.optimizer.state_dict()["state"]}
    return Trained(ending, len(resorts), sum(len(e.born) for e in events), batches, recorded)


def furthest(a: Trained, b: Trained) -> float:
    """The largest difference between any two numbers of the endings, which must hold the same tensors."""
    return _furthest(a.ending, b.ending)


def _furthest(a: Any, b: Any) -> float:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((_furthest(a[k], b[k]) for k in a), default=0.0)
    if isinstance(a, Tensor):
        assert a.shape == b.shape
        return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    assert type(a) is type(b)
    return 0.0
