"""How a network uses its parameters in one forward pass, and what each use adds to the Jacobian.

A ``Linear`` layer or a convolution multiplies a weight with T inputs per sample, y_t = W x_t. The derivative of an
output f_k by that weight is then a sum of T outer products, sum_t delta_kt x_t^T with delta = df_k/dy, and neither the
weight nor the derivative need ever be written out: delta and x are enough (Novak, Sohl-Dickstein, Schoenholz 2022,
arXiv:2206.08720, call this structured derivatives). A parameter is treated so only if *each* of its uses in the
forward pass is one of the functions below; all others are left to ``torch.func``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

from torch_meanfield.observe.observer import Call, Observer


@dataclass(eq=False)
class Use:
    """One call of a function that is linear in its parameters.

    Attributes:
        kind: ``"linear"``, ``"conv"`` or ``"scale"`` (the affine part of a normalisation).
        weight, bias: The parameters by name; ``None`` where there is none or it is not trained.
        edge: The place of the call's result in the graph.
        shape: Shape of the call's result, ``(B, ...)``.
        channel: The dimension of the result that a bias runs along.
        inputs: What the weight is multiplied with: ``(B, ..., n)``, ``(B, n, H, W)`` or, for ``"scale"``, of the
            result's shape.
        unfold: For a convolution, the arguments of ``torch.nn.functional.unfold``.
        groups: Number of groups of a convolution.
        deltas: The gradients of the outputs by the call's result, ``(B, k, *result.shape[1:])``.
    """

    kind: str
    weight: str | None
    bias: str | None
    edge: GradientEdge | None
    inputs: Tensor
    shape: torch.Size
    channel: int = -1
    unfold: dict[str, Any] = field(default_factory=dict)
    groups: int = 1
    deltas: Tensor | None = None

    def columns(self) -> Tensor:
        """The inputs as ``(B, T, n)``: T vectors per sample that the weight is multiplied with."""
        x = self.inputs
        if self.kind == "conv":
            return F.unfold(x, **self.unfold).transpose(1, 2)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def rows(self) -> Tensor:
        """The gradients as ``(B, k, T, m)``, m the outputs of the weight."""
        assert self.deltas is not None
        d = self.deltas
        if self.channel == 1:  # (B, k, m, H, W): the channels come first
            return d.reshape(*d.shape[:3], -1).transpose(2, 3)
        return d.reshape(*d.shape[:2], -1, d.shape[-1])

    def bias_jacobian(self) -> Tensor:
        """The derivative by the bias, ``(B, k, p)``."""
        assert self.deltas is not None
        return self._summed(self.deltas)

    def scale_jacobian(self) -> Tensor:
        """The derivative by the weight of a normalisation, ``(B, k, p)``."""
        assert self.deltas is not None
        return self._summed(self.deltas * self.inputs[:, None])

    def _summed(self, d: Tensor) -> Tensor:
        if self.kind == "scale" and self.channel == -1:  # layer norm: a parameter for each normalised coordinate
            return d.reshape(*d.shape[:2], -1, int(self.unfold["size"])).sum(2)
        if self.channel == 1:
            return d.reshape(*d.shape[:3], -1).sum(3)
        return d.reshape(*d.shape[:2], -1, d.shape[-1]).sum(2)


def observe(model: Callable[[Tensor], Tensor], x: Tensor, names: dict[int, str]) -> tuple[Tensor, list[Use], set[str]]:
    """Run the model and note how it uses its trained parameters.

    Args:
        model: What is called with ``x``.
        x: A batch, ``(B, ...)``.
        names: The names of the trained parameters by ``id``.

    Returns:
        The output; the uses that are understood; the names of the parameters that have another use besides.
    """
    uses: list[Use] = []
    others: set[str] = set()

    def watch(call: Call) -> None:
        if not any(t.requires_grad for t in _tensors(call.result)):
            return  # a shape, a flag, a detached copy: nothing that a gradient comes back through
        mine = {names[id(t)] for t in _tensors((call.args, tuple(call.kwargs.values()))) if id(t) in names}
        if mine:
            use = _understood(call, names, x.shape[0])
            if use is None:
                others.update(mine)
            else:
                others.update(mine - {use.weight, use.bias})
                uses.append(use)

    with torch.enable_grad(), Observer(watch):
        out = model(x)
    return out, uses, others


@torch.enable_grad()
def differentiate_(out: Tensor, uses: Sequence[Use]) -> None:
    """Fill in ``deltas``: the gradient of each output by the result of each use. ``out`` is ``(B, k)``.

    One backward pass per output for all samples together, which is right because samples do not interact.
    """
    edges = [use.edge for use in uses]
    outputs = out.shape[1]
    for use in uses:
        use.deltas = out.new_zeros(use.shape[0], outputs, *use.shape[1:])
    for k in range(outputs if edges else 0):
        keep = k + 1 < outputs
        found = torch.autograd.grad(out[:, k].sum(), edges, retain_graph=keep, allow_unused=True)  # type: ignore[arg-type]
        for use, gradient in zip(uses, found, strict=True):
            assert use.deltas is not None
            if gradient is not None:
                use.deltas[:, k].copy_(gradient.detach())
    for use in uses:
        use.edge = None  # the graph may go


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _understood(call: Call, names: dict[int, str], batch: int) -> Use | None:
    handle = {
        "linear": _linear,
        "conv1d": _conv,
        "conv2d": _conv,
        "batch_norm": _batch_norm,
        "layer_norm": _layer_norm,
        "group_norm": _group_norm,
    }.get(call.name)
    x = call.arg(0, "input")
    if handle is None or not isinstance(x, Tensor) or not isinstance(call.result, Tensor):
        return None
    # Whatever does not carry the samples in its first dimension (windows, positions) is left to torch.func.
    if id(x) in names or x.dim() < 2 or x.shape[0] != batch or call.result.shape[0] != batch:
        return None
    return handle(call, x.detach(), names)


def _of(names: dict[int, str], tensor: Any) -> str | None:
    return names.get(id(tensor))


def _linear(call: Call, x: Tensor, names: dict[int, str]) -> Use | None:
    weight, bias = call.arg(1, "weight"), call.arg(2, "bias")
    edge = get_gradient_edge(call.result)
    return Use("linear", _of(names, weight), _of(names, bias), edge, x, call.result.shape)


def _conv(call: Call, x: Tensor, names: dict[int, str]) -> Use | None:
    weight, bias = call.arg(1, "weight"), call.arg(2, "bias")
    stride, padding = call.arg(3, "stride", 1), call.arg(4, "padding", 0)
    dilation, groups = call.arg(5, "dilation", 1), int(call.arg(6, "groups", 1))
    dims = weight.dim() - 2
    if x.dim() != dims + 2:
        return None  # without a batch
    kernel, dilation, stride = list(weight.shape[2:]), _list(dilation, dims), _list(stride, dims)
    if padding == "valid":
        padding = 0
    if padding == "same":
        if any((k - 1) * d % 2 for k, d in zip(kernel, dilation, strict=True)):
            return None  # padded on one side more than on the other
        padding = [(k - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True)]
    padding = _list(padding, dims)
    if dims == 1:  # as an image of one row
        x, kernel, stride = x.unsqueeze(2), [1, *kernel], [1, *stride]
        dilation, padding = [1, *dilation], [0, *padding]
    unfold = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    edge = get_gradient_edge(call.result)
    shape = call.result.shape
    return Use("conv", _of(names, weight), _of(names, bias), edge, x, shape, 1, unfold, groups)


def _list(value: Any, dims: int) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, (tuple, list)) else [int(value)]
    return values * dims if len(values) == 1 else values


def _batch_norm(call: Call, x: Tensor, names: dict[int, str]) -> Use | None:
    mean, var = call.arg(1, "running_mean"), call.arg(2, "running_var")
    if call.arg(5, "training", False) or mean is None or var is None:
        return None
    shape = (1, -1) + (1,) * (x.dim() - 2)
    eps = float(call.arg(7, "eps", 1e-5))
    normal = (x - mean.detach().view(shape)) * (var.detach() + eps).rsqrt().view(shape)
    return _scale(call, normal, names, call.arg(3, "weight"), call.arg(4, "bias"), 1)


def _layer_norm(call: Call, x: Tensor, names: dict[int, str]) -> Use | None:
    size, eps = list(call.arg(1, "normalized_shape")), float(call.arg(4, "eps", 1e-5))
    use = _scale(call, F.layer_norm(x, size, eps=eps), names, call.arg(2, "weight"), call.arg(3, "bias"), -1)
    use.unfold = {"size": torch.Size(size).numel()}
    return use


def _group_norm(call: Call, x: Tensor, names: dict[int, str]) -> Use | None:
    normal = F.group_norm(x, int(call.arg(1, "num_groups")), eps=float(call.arg(4, "eps", 1e-5)))
    return _scale(call, normal, names, call.arg(2, "weight"), call.arg(3, "bias"), 1)


def _scale(call: Call, normal: Tensor, names: dict[int, str], weight: Any, bias: Any, channel: int) -> Use:
    edge = get_gradient_edge(call.result)
    return Use("scale", _of(names, weight), _of(names, bias), edge, normal, call.result.shape, channel)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
