"""The routes by which a model's tangent kernel is computed and the memory they take, found from two samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_meanfield.theory.contraction import jacobian
from torch_meanfield.theory.uses import Use, differentiate_, observe, trained

SMALLEST_WORKSPACE = 16 << 20
LARGEST_WORKSPACE = 256 << 20
FUNCTIONAL_GROUP = 1 << 22  # numbers per sample and output that torch.func is asked for at once


@dataclass(frozen=True)
class Routes:
    """By which route each parameter's part of the kernel is computed, and what a sample costs in bytes.

    Attributes:
        factored: Weights whose Jacobian stays in factors, and the groups of the convolution (else 1).
        dense: Biases and scales, whose Jacobian is as small as they are.
        functional: What is left to ``torch.func``, in groups of parameters that are asked for together.
        outputs: k, of the model.
        rows: Rows of the kernel for each sample: k, or 1 if the trace is taken.
        graph: What autograd keeps for one sample.
        held: What a block keeps for one sample: inputs and gradients of each use.
        transient: The most that a single parameter's Jacobian needs for one sample while it is added.
        channel: The most that one output channel's written-out Jacobian needs for one sample.
    """

    factored: dict[str, int]
    dense: list[str]
    functional: list[list[str]]
    outputs: int
    rows: int
    graph: int
    held: int
    transient: int
    channel: int
    dtype: torch.dtype
    device: torch.device

    def need(self, counts: tuple[int, int | None], size: int) -> int:
        """Bytes for blocks of ``size`` samples, without the freely chosen part of the work space."""
        n, other = counts
        blocks = 1 if other is None and size >= n else 2
        kernel = n * (n if other is None else other) * self.rows**2 * self.dtype.itemsize
        per_sample = self.graph + blocks * (self.held + self.transient)
        return kernel + size * per_sample + max(SMALLEST_WORKSPACE, 2 * blocks * size * self.channel)

    def block_size(self, counts: tuple[int, int | None], wanted: int | None, max_bytes: int) -> int:
        """The largest block that fits, or ``wanted`` if it does.

        Raises:
            ValueError: It does not fit; with the block size that does.
        """
        largest = max(counts[0], counts[1] or 0)
        low, high = 0, largest  # the largest that fits lies in [low, high]; memory grows with the size
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.need(counts, middle) <= max_bytes else (low, middle - 1)
        asked = min(largest, wanted or max(1, low))
        if self.need(counts, asked) <= max_bytes:
            return asked
        needed = self.need(counts, asked)
        way_out = (
            f"block_size={low} fits"
            if low
            else "no block size fits: take fewer samples, "
            + ("" if self.rows < self.outputs or self.outputs == 1 else "reduce='trace', ")
            + "fewer outputs, or raise max_bytes"
        )
        raise ValueError(
            f"the tangent kernel needs {needed:,} bytes with block_size={asked}, and max_bytes is {max_bytes:,}: "
            f"{way_out}"
        )

    def workspace(self, counts: tuple[int, int | None], size: int, max_bytes: int) -> int:
        """Bytes that one product may use at a time."""
        free = max_bytes - self.need(counts, size) + SMALLEST_WORKSPACE
        return max(SMALLEST_WORKSPACE, min(LARGEST_WORKSPACE, free))


def routes(model: nn.Module, pair: Tensor, *, trace: bool) -> Routes:
    """Find the routes by running two samples through the model.

    A parameter keeps its factors only if they give, for a random combination of the outputs, the gradient that
    autograd gives; otherwise (it is used where the observer does not see it, or samples do not lie in the first
    dimension) it is left to ``torch.func``.

    Raises:
        ValueError: The samples interact, or the output carries no gradient.
    """
    parameters = trained(model)
    names = {id(p): name for name, p in parameters.items()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(tensor) not in names:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out, uses, others = observe(model, pair, names)
    _check_output(model, out, pair)
    out = out.reshape(2, -1)
    shapes = [(use.inputs.numel() // 2, use.shape.numel() // 2) for use in uses]
    proven = _proven(out, uses, {n: p for n, p in parameters.items() if n not in others})
    factored = {use.weight: use.groups for use in uses if use.kind != "scale" and use.weight in proven}
    dense = {use.bias for use in uses} | {use.weight for use in uses if use.kind == "scale"}
    proven -= factored.keys() & dense  # a weight here and a bias there: the cross terms are torch.func's
    left = [name for name in parameters if name not in proven]
    groups = _grouped(left, parameters)
    outputs, byte = out.shape[1], out.dtype.itemsize
    per_sample = [outputs * max(sum(parameters[name].numel() for name in group) for group in groups)] if groups else [0]
    channel = [0]
    for use in uses:
        if use.kind != "scale":
            columns, rows = use.columns()[:1], use.rows()[:1]
            per_sample.append(2 * (columns.numel() + outputs * rows.numel()))
            channel.append((1 if trace else outputs) * columns.shape[2])
    return Routes(
        factored={name: g for name, g in factored.items() if name is not None and name in proven},
        dense=sorted(name for name in dense if name in proven and name is not None),
        functional=groups,
        outputs=outputs,
        rows=1 if trace else outputs,
        graph=sum(kept.values()) // 2 * (2 if not groups else 2 + outputs),
        held=sum(i + outputs * o for i, o in shapes) * byte,
        transient=max(per_sample) * byte,
        channel=max(channel) * byte,
        dtype=out.dtype,
        device=out.device,
    )


def _check_output(model: nn.Module, out: Any, pair: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise ValueError(f"the model must return a tensor, it returned {type(out).__name__}; wrap it in one that does")
    if out.dim() == 0 or out.shape[0] != 2:
        raise ValueError(f"the model must return (B, ...) for B samples; for two it returned shape {tuple(out.shape)}")
    if not out.requires_grad:
        raise ValueError(
            "the output depends on no parameter that requires a gradient; call requires_grad_(True) on some"
        )
    if not out.is_floating_point():
        raise ValueError(f"the output must be real, its dtype is {out.dtype}")
    with torch.no_grad():
        alone = model(pair[:1])
    scale = out.detach().abs().max()
    if not torch.isfinite(scale):
        raise ValueError(
            "the output of the first and the last sample is not finite; look at x and at the model's weights"
        )
    if (alone - out.detach()[:1]).abs().max() > 1e-3 * scale + 1e-12:
        raise ValueError(
            "a sample's output changes with the rest of its batch (batch norm without running statistics?): such a "
            "model has no kernel between two samples"
        )


def _proven(out: Tensor, uses: list[Use], parameters: dict[str, nn.Parameter]) -> set[str]:
    """Those parameters whose factors give autograd's gradient of a random combination of sample 0's outputs."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(out.shape[1], generator=generator, dtype=torch.float64, device="cpu").to(out)
    combination = (out * direction).sum(1, keepdim=True)
    seen = {name for use in uses for name in (use.weight, use.bias) if name in parameters}
    candidates = {name: p for name, p in parameters.items() if name in seen}
    if not candidates:
        return set()
    wanted = torch.autograd.grad(combination[0, 0], list(candidates.values()), retain_graph=True, allow_unused=True)
    differentiate_(combination, uses)
    proven = set()
    for (name, p), gradient in zip(candidates.items(), wanted, strict=True):
        found = sum((_gradient(use, name) for use in uses), torch.zeros_like(p).flatten())
        gradient = torch.zeros_like(p) if gradient is None else gradient
        error = (found.detach().flatten() - gradient.flatten()).abs().max()
        if error <= 1e-3 * gradient.abs().max():
            proven.add(name)
    return proven


def _gradient(use: Use, name: str) -> Tensor:
    """What one use adds to the gradient of the first sample's first output, flat; 0 if it is another parameter's."""
    total = torch.zeros((), device=use.inputs.device)
    if use.kind != "scale" and use.weight == name:
        rows, columns = use.rows()[:1], use.columns()[:1]
        whole = (0, use.groups, 0, rows.shape[-1] // use.groups)
        total = jacobian((rows, columns), use.groups, whole)[0]
    if use.kind == "scale" and use.weight == name:
        total = use.scale_jacobian()[0, 0]
    if use.bias == name:
        total = use.bias_jacobian()[0, 0]
    return total


def _grouped(names: list[str], parameters: dict[str, nn.Parameter]) -> list[list[str]]:
    groups: list[list[str]] = []
    room = 0
    for name in names:
        if parameters[name].numel() > room:
            groups.append([])
            room = FUNCTIONAL_GROUP
        groups[-1].append(name)
        room -= parameters[name].numel()
    return groups
