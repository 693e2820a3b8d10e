"""The empirical neural tangent kernel of any model, in blocks, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_meanfield.theory.contraction import add_product_
from torch_meanfield.theory.tangent_routes import Routes, routes
from torch_meanfield.theory.uses import Use, differentiate_, observe, trained

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def empirical_ntk(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    block_size: int | None = None,
    max_bytes: int = 2 << 30,
    reduce: Literal["trace"] | None = None,
) -> Tensor:
    r"""The tangent kernel K = J J^T of a model at its present parameters.

    :math:`K[(b,k),(b',k')] = \langle\partial_\theta f_k(x_b),\,\partial_\theta f_{k'}(x'_{b'})\rangle`, the sum being
    over all parameters that require a gradient (Jacot, Gabriel, Hongler 2018; Yang 2022, "DNN evolution"). It
    is computed exactly. The layers that a network mostly consists of (linear, convolution, normalisation) need
    no Jacobian to be written out (see ``uses.py``); what is left goes through ``torch.func.jacrev``. Rows are
    treated in blocks of samples, so that memory stays within ``max_bytes``.

    The model is evaluated in ``eval()`` mode: batch norm with its running statistics, no dropout. Each sample's
    output must depend on that sample alone. The model is left as it was: mode, buffers, gradients, parameters. A
    network whose layers must be run through ``torch.func`` (attention in one function, recurrent cells) must be one
    that ``torch.func.vmap`` accepts.

    Args:
        model: A module that maps a batch ``(B, ...)`` to outputs ``(B, k)`` or ``(B, ...)``, of which k are then
            counted flat. For a network of 1,000 classes wrap it, so that it returns fewer: memory and time grow with
            k.
        x: A batch, ``(B, ...)``, on the model's device.
        y: Another batch ``(B', ...)``; ``None``: the kernel of ``x`` with itself.
        block_size: Samples treated at a time; ``None``: as many as fit. Fewer cost time, as each pair of blocks is
            visited, and change nothing in the result but its rounding.
        max_bytes: A bound for what is allocated besides the model: activations, gradients, work space and the kernel.
        reduce: ``"trace"``: sum over k = k', which leaves one number for each pair of samples.

    Returns:
        ``(B k, B' k)``, row ``b * k_total + k``; with ``reduce="trace"``, ``(B, B')``. In the dtype of the output.

    Raises:
        TypeError: ``model`` is no module, or ``x`` no tensor.
        ValueError: Nothing to differentiate, parameters on several devices, an empty batch, samples that interact
            (batch norm without running statistics), an argument out of range; memory that would be exceeded, which is
            said before the work, with the block size that fits.

    Example:
        >>> net = nn.Linear(3, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
        >>> empirical_ntk(net, x)  # of a linear model: the Gram matrix of its inputs
        tensor([[5., 2.],
                [2., 2.]])
    """
    check(model, x, y, block_size, max_bytes, reduce)
    with evaluating(model):
        return _kernel(model, x, y, block_size, max_bytes, reduce == "trace")


@torch.no_grad()
def _kernel(
    model: nn.Module, x: Tensor, y: Tensor | None, block_size: int | None, max_bytes: int, trace: bool
) -> Tensor:
    others = x if y is None else y
    counts = (len(x), None if y is None else len(y))
    # Two samples tell how the parameters are used, that samples do not interact, and what a sample costs.
    with torch.enable_grad():
        route = routes(model, torch.cat([x[:1], others[-1:]]), trace=trace)
    size = route.block_size(counts, block_size, max_bytes)
    workspace = route.workspace(counts, size, max_bytes)
    rows = route.rows
    kernel = torch.zeros(len(x) * rows, len(others) * rows, dtype=route.dtype, device=route.device)
    for i in range(0, len(x), size):
        left = _Block(model, x[i : i + size], route, trace)
        for j in range(i if y is None else 0, len(others), size):
            right = left if y is None and i == j else _Block(model, others[j : j + size], route, trace)
            at = slice(i * rows, (i + size) * rows), slice(j * rows, (j + size) * rows)
            _add_(kernel[at], left, right, route, workspace)
            if y is None and i != j:
                kernel[at[1], at[0]] = kernel[at].T
    return kernel


class _Block:
    """The Jacobian of some samples: factors for each weight, and the rest through torch.func on demand."""

    def __init__(self, model: nn.Module, x: Tensor, route: Routes, trace: bool) -> None:
        self.model, self.x, self.trace = model, x, trace
        self.uses: list[Use] = []
        structured = {*route.factored, *route.dense}
        if structured:
            names = {id(p): name for name, p in trained(model).items() if name in structured}
            out, self.uses, _ = observe(model, x, names)
            with torch.enable_grad():
                out = out.reshape(len(x), -1)
            differentiate_(out, self.uses)

    def factors(self, name: str, groups: int) -> tuple[Tensor, Tensor]:
        """Gradients ``(B, k, T, m)`` and inputs ``(B, T, n)`` of a weight, over all its uses."""
        mine = [use for use in self.uses if use.weight == name]
        rows, columns = torch.cat([use.rows() for use in mine], 2), torch.cat([use.columns() for use in mine], 1)
        if self.trace:  # the sum over outputs is one over more channels, k to each of the old ones
            b, k, t, m = rows.shape
            rows = rows.view(b, k, t, groups, m // groups).permute(0, 2, 3, 1, 4).reshape(b, 1, t, k * m)
        return rows, columns

    def dense(self, name: str) -> Tensor:
        """The Jacobian by a bias or the scale of a normalisation, ``(B k, p)``."""
        terms = [use.bias_jacobian() for use in self.uses if use.bias == name]
        terms += [use.scale_jacobian() for use in self.uses if use.weight == name]
        return self._flat(torch.stack(terms).sum(0))

    def functional(self, names: list[str]) -> Tensor:
        """The Jacobian by any parameters, by ``torch.func``, ``(B k, p)``."""
        chosen = {name: p.detach() for name, p in trained(self.model).items() if name in names}

        def outputs(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
            out: Tensor = functional_call(self.model, parameters, (sample.unsqueeze(0),))
            return out.reshape(-1)

        # the fused kernels of attention have no batching rule for their gradient
        with sdpa_kernel(SDPBackend.MATH):
            jacobian = vmap(jacrev(outputs), in_dims=(None, 0), chunk_size=1)(chosen, self.x)
        return self._flat(torch.cat([jacobian[name].flatten(2) for name in chosen], 2))

    def _flat(self, jacobian: Tensor) -> Tensor:
        return jacobian.flatten(1) if self.trace else jacobian.flatten(0, 1)


def _add_(kernel: Tensor, left: _Block, right: _Block, route: Routes, workspace: int) -> None:
    same = left is right
    for name, groups in route.factored.items():
        factors = left.factors(name, groups)
        others = factors if same else right.factors(name, groups)
        add_product_(kernel, factors, others, groups=groups, workspace=workspace)
    for name in route.dense:
        rows = left.dense(name)
        kernel.addmm_(rows, (rows if same else right.dense(name)).T)
    for names in route.functional:
        rows = left.functional(names)
        kernel.addmm_(rows, (rows if same else right.functional(names)).T)


def check(
    model: nn.Module, x: Tensor, y: Tensor | None, block_size: int | None, max_bytes: int, reduce: str | None
) -> None:
    """Raise what :func:`empirical_ntk` promises, before any work."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if reduce not in (None, "trace"):
        raise ValueError(f"reduce must be None or 'trace', got {reduce!r}")
    for name, value in (("block_size", block_size), ("max_bytes", max_bytes)):
        if value is None and name == "block_size":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        listed = ", ".join(sorted(str(d) for d in devices))
        raise ValueError(f"the model's parameters are on several devices ({listed}); move it to one")
    if not trained(model):
        raise ValueError("the model has no parameter that requires a gradient: there is nothing to differentiate by")
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and module.running_mean is None:
            raise ValueError(
                f"the batch norm {name!r} keeps no running statistics, so that samples interact and have no kernel of "
                f"their own; make it with track_running_stats=True"
            )
    for name, batch in (("x", x), ("y", y)):
        if batch is None and name == "y":
            continue
        if not isinstance(batch, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(batch).__name__}")
        if batch.dim() == 0 or batch.shape[0] == 0:
            raise ValueError(f"{name} must be a batch of at least one sample, got shape {tuple(batch.shape)}")
        if batch.device not in devices:
            raise ValueError(f"{name} is on {batch.device}, the model on {next(iter(devices))}; move one of them")
    if y is not None and (y.shape[1:] != x.shape[1:] or y.dtype != x.dtype):
        raise ValueError(
            f"y must hold samples like those of x, {tuple(x.shape[1:])} of {x.dtype}; "
            f"got {tuple(y.shape[1:])} of {y.dtype}"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in ``eval()`` mode; each module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
