"""The blocks of a stack in a diagnosis: what each is worth, what exchanges would cost, and how far they go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_meanfield.depth import MeanFieldSequential
from torch_meanfield.depth.euler import euler_step
from torch_meanfield.theory.continuum import trajectory
from torch_meanfield.theory.diagnosis.parts import Particles
from torch_meanfield.theory.exchange import exchange_prices

PROBES = 4  # adjoint passes for the curvature of the price of an exchange


@dataclass(eq=False)
class Seen:
    """One stack in the forward pass: its input and output, ``None`` once it was called again."""

    name: str
    stack: MeanFieldSequential
    input: Tensor | None = None
    output: Tensor | None = None
    calls: int = 0


@contextmanager
def watching(model: nn.Module) -> Iterator[list[Seen]]:
    """Catch what the mean-field stacks of ``model`` read and put out in its forward pass."""
    stacks = [Seen(n or type(m).__name__, m) for n, m in model.named_modules() if isinstance(m, MeanFieldSequential)]

    def hook(seen: Seen) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            seen.calls += 1
            seen.input, seen.output = (args[0].detach(), output) if seen.calls == 1 else (None, None)

        return note

    handles = [seen.stack.register_forward_hook(hook(seen)) for seen in stacks]
    try:
        yield stacks
    finally:
        for handle in handles:
            handle.remove()


def measured(
    stacks: Sequence[Seen], loss: Tensor, output: Tensor, kind: str, again: Callable[[], Tensor]
) -> tuple[Particles, ...]:
    """What is said of each stack.

    Args:
        stacks: From :func:`watching`.
        loss: The loss, its graph kept.
        output: The model's, likewise.
        kind: What the loss is; the curvature is known of squared error and cross entropy.
        again: Runs the model anew from the same random state and gives the loss.
    """
    return tuple(_measured(seen, loss, output, kind, again) for seen in stacks)


def _measured(seen: Seen, loss: Tensor, output: Tensor, kind: str, again: Callable[[], Tensor]) -> Particles:
    steps = seen.stack.steps().detach().double()
    plain = Particles(seen.name, steps.sum().item(), tuple(steps.tolist()))
    if seen.input is None or seen.output is None or not seen.output.requires_grad or seen.input.ndim < 2:
        return plain  # not run, run twice, or behind what no gradient comes through
    removal = tuple(_without(block, again) - loss.item() for block in seen.stack)
    if seen.stack.solver is not euler_step:
        return Particles(plain.name, plain.horizon, plain.steps, removal)
    (adjoint,) = torch.autograd.grad(loss, seen.output, retain_graph=True, allow_unused=True)
    if adjoint is None:
        return plain
    where = trajectory(seen.stack, (seen.input, adjoint), loss=_inner)
    probes = []
    for k in range(PROBES):
        v = _probe(output, kind, k)
        if v is not None:
            (q,) = torch.autograd.grad(output, seen.output, v, retain_graph=True)
            probes.append(trajectory(seen.stack, (seen.input, q), loss=_inner))
    lengths = [x.double().square().mean().sqrt().item() for x in where.states]
    jumps = [d.double().square().mean().sqrt().item() for d in where.states.diff(dim=0)]
    effective = sum(d / x for d, x in zip(jumps, lengths, strict=False) if x > 0)
    prices = tuple(exchange_prices(where, probes).double().tolist())
    return Particles(plain.name, plain.horizon, plain.steps, removal, prices, effective)


def _inner(out: Tensor, v: Tensor) -> Tensor:
    return (out * v).sum()


def _without(block: nn.Module, again: Callable[[], Tensor]) -> float:
    handle = block.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    try:
        return again().item()
    finally:
        handle.remove()


def _probe(output: Tensor, kind: str, seed: int) -> Tensor | None:
    """A random cotangent whose covariance is the Hessian of the loss of one input."""
    draw = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), device="cpu", dtype=torch.float64)
    v: Tensor = draw.to(output)
    if kind == "squared error":  # the mean over all entries of an input's square
        v = v * (2 * len(output) / output.numel()) ** 0.5
        return v
    if kind == "cross entropy" and output.ndim == 2:
        p: Tensor = output.detach().softmax(1)
        v = p.sqrt() * v - p * (p.sqrt() * v).sum(1, keepdim=True)
        return v
    return None
