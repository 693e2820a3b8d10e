r"""The continuum of a mean-field stack: states forwards, adjoints backwards, the gradient by any block at any time.

The population :math:`\rho(\theta, t)` of a :class:`~torch_meanfield.MeanFieldSequential` has one block at a time: the
l-th acts on :math:`(\tau^{l-1}, \tau^l]`. With it

.. math:: \dot X_t = \int f(X_t, \theta)\,\rho(\theta, t)\,d\theta, \qquad
          \dot p_t = -p_t \int \nabla_X f(X_t, \theta)\,\rho(\theta, t)\,d\theta, \quad p_T = \partial E / \partial X_T

are solved by ``substeps`` Euler steps within each block, and the adjoint is that of these steps. So every number here
is an exact derivative of a network: at ``substeps=1`` of the layer itself, eq. (15), and of the continuum in the limit.
Source: Lu et al. 2020, (3), (7) to (10), Theorem 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_meanfield.depth import MeanFieldSequential
from torch_meanfield.depth.euler import euler_step
from torch_meanfield.observe import private_copy, undisturbed

Block = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
NODE = 1e-7  # of the horizon: how near to a node a time is that node


def half_squared(output: Tensor, target: Tensor) -> Tensor:
    """The mean over the batch of half the squared distance: eq. (2) of Lu et al. 2020."""
    if output.shape != target.shape:
        raise ValueError(f"the output has shape {tuple(output.shape)}, the target {tuple(target.shape)}; pass loss=")
    return (output - target).square().sum() / (2 * len(output))


@dataclass(frozen=True, eq=False)
class StreamTrajectory:
    r"""A stack's states and adjoints on the tau axis, from :func:`trajectory`.

    Attributes:
        times: ``(m + 1,)``, from 0 to the last tau, the m cells between them those of the blocks, ``substeps`` each.
        states: X at the times, ``(m + 1, B, ...)``.
        adjoints: p = dE/dX at the times, shaped like ``states``. E is a mean over the batch: so p holds the 1/B, and
            an inner product that is summed over the batch is the expectation.
        blocks: The block that acts in each cell; private copies.
        by_step: dE by the length of each cell, :math:`E\langle p^l, f(X^{l-1}, \theta^l)\rangle`; ``(m,)``. With
            ``substeps=1`` the tau gradient of eq. (15) is the difference of two: dE/dtau^l = by_step[l] -
            by_step[l + 1], the second absent behind the last block.
        loss: E.
    """

    times: Tensor
    states: Tensor
    adjoints: Tensor
    blocks: tuple[nn.Module, ...]
    by_step: Tensor
    loss: float

    def cells(self, t: float) -> list[tuple[int, int, int]]:
        """Where t lies: the index of a state, of an adjoint, and of a block that acts there.

        One such triple inside a cell; at a node one for each cell that it ends or begins.

        Raises:
            ValueError: t outside [0, T].
        """
        times = self.times.tolist()
        near = NODE * max(times[-1], torch.finfo(torch.float64).tiny)
        if not -near <= t <= times[-1] + near:
            raise ValueError(f"t must lie in [0, {times[-1]:g}], the stack's times, got {t!r}")
        nodes = [j for j, time in enumerate(times) if abs(time - t) <= near]
        if nodes:
            j, last = nodes[0], len(times) - 1
            return [(j, j, k) for k in (j - 1, j) if 0 <= k < last]
        cell = sum(time < t for time in times) - 1
        return [(cell, cell + 1, cell)]

    def gradient(self, theta: Block, t: float | Sequence[float] | Tensor) -> Tensor:
        """See :func:`functional_gradient`."""
        times = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        values = []
        for time in times.flatten().tolist():
            state, adjoint, _ = self.cells(time)[0]
            values.append((self.adjoints[adjoint] * applied(theta, self.states[state])).sum())
        return torch.stack(values).reshape(times.shape)


def trajectory(
    layer: MeanFieldSequential,
    batch: tuple[Tensor, Tensor],
    *,
    loss: Loss = half_squared,
    substeps: int = 1,
    max_bytes: int = 2 << 30,
) -> StreamTrajectory:
    """One forward and one adjoint pass of a stack, kept whole.

    The stack is copied and runs in the mode it is in; it keeps its parameters, buffers, gradients and hooks, and the
    process its random state.

    Args:
        layer: The stack; what stands before it belongs into the batch, what stands behind it into the loss.
        batch: The stack's input and the target.
        loss: Of the stack's output and the target, a scalar that is a mean over the batch.
        substeps: Euler steps within each block.
        max_bytes: What states and adjoints may take.

    Raises:
        TypeError: ``layer`` is no ``MeanFieldSequential``, ``batch`` no pair of tensors.
        ValueError: Another solver than Euler's, a number out of its range, a loss that is no scalar or does not depend
            on the output, or more memory than ``max_bytes``, with the batch that fits.

    Source: Lu et al. 2020, (3), (7) to (9).
    """
    x, target = _checked(layer, batch, substeps, max_bytes)
    copy = private_copy(layer)
    for mine, theirs in zip(copy.modules(), layer.modules(), strict=True):
        mine.training = theirs.training
    with torch.no_grad():
        tau = layer.tau_axis.read().clamp(min=0)
        order, ends = tau.argsort(stable=True).tolist(), tau.sort().values.double().cpu()
        steps = (layer.steps().detach() / substeps).to(x.device).repeat_interleave(substeps)
    blocks = tuple(copy[i] for i in order for _ in range(substeps))  # type: ignore[index]
    states, outputs = [x.detach()], []
    with undisturbed(), torch.enable_grad():
        for block, step in zip(blocks, steps, strict=True):
            states[-1] = states[-1].requires_grad_()
            outputs.append(applied(block, states[-1]))
            states.append((states[-1] + step.to(x.dtype) * outputs[-1]).detach())
        last = states[-1].requires_grad_()
        value = loss(last, target)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ValueError(f"loss must return a scalar tensor that depends on the output, got {value!r:.80}")
        adjoints, by_step = list(torch.autograd.grad(value.reshape(()), last)), []
        while outputs:
            p, output, state, step = adjoints[-1], outputs.pop(), states[len(outputs)], steps[len(outputs)]
            by_step.append((p * output.detach()).sum())
            adjoints.append(p + step.to(p.dtype) * pulled_back(output, state, p))
    begins, part = torch.cat([ends.new_zeros(1), ends[:-1]]), ends.new_tensor(range(1, substeps + 1)) / substeps
    inner = torch.lerp(begins[:, None], ends[:, None], part).flatten()
    return StreamTrajectory(
        torch.cat([ends.new_zeros(1), inner]),
        torch.stack([s.detach() for s in states]),
        torch.stack(adjoints[::-1]),
        blocks,
        torch.stack(by_step[::-1]),
        value.item(),
    )


def functional_gradient(
    layer: MeanFieldSequential,
    batch: tuple[Tensor, Tensor],
    theta: Block,
    t: float | Sequence[float] | Tensor,
    *,
    loss: Loss = half_squared,
    substeps: int = 1,
) -> Tensor:
    r"""How the loss changes with a little of any block at any time, whether the stack has such a block or not.

    .. math:: \frac{\delta E}{\delta\rho}(\theta, t) = E_x\langle p_t(x),\ f(X_t(x), \theta)\rangle

    Where it is negative, a new block pays at once. Inside a cell it is the derivative by a block that acts beside the
    one that is there (X before it, p behind it), for the block itself dE/dtau of its step; at a node it is that by a
    block of its own between the two, such as one that is born there with a small step.

    Args:
        layer, batch, loss, substeps: See :func:`trajectory`, whose result has this as ``gradient(theta, t)``, for many
            candidates.
        theta: The candidate f(., theta): a module, or any function of a state that keeps its shape.
        t: One or more times in [0, T].

    Returns:
        Shaped like ``t``, differentiable in the parameters of ``theta``.

    Raises:
        ValueError: As :func:`trajectory`; a time out of range; a candidate that changes the shape.

    Source: Lu et al. 2020, (10), Theorem 2.

    Example:
        >>> layer = MeanFieldSequential(*(nn.Linear(3, 3) for _ in range(4)), horizon=1.0)
        >>> batch = torch.randn(8, 3), torch.randn(8, 3)
        >>> functional_gradient(layer, batch, torch.tanh, [0.0, 0.3, 1.0]).shape
        torch.Size([3])
    """
    return trajectory(layer, batch, loss=loss, substeps=substeps).gradient(theta, t)


def applied(block: Block, x: Tensor) -> Tensor:
    """``block(x)``, or an error if that cannot be added to ``x``."""
    out = block(x)
    if not isinstance(out, Tensor) or out.shape != x.shape:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"a block must keep the shape of a state, {tuple(x.shape)}; it returned {got}")
    return out


def pulled_back(output: Tensor, state: Tensor, p: Tensor) -> Tensor:
    """p times the Jacobian of ``output`` by ``state``; 0 for a block that does not read its input."""
    found = torch.autograd.grad(output, state, p, allow_unused=True)[0] if output.requires_grad else None
    return torch.zeros_like(p) if found is None else found


def _checked(layer: object, batch: object, substeps: object, max_bytes: int) -> tuple[Tensor, Tensor]:
    if not isinstance(layer, MeanFieldSequential):
        raise TypeError(f"layer must be a MeanFieldSequential, got {type(layer).__name__}")
    if layer.solver is not euler_step:
        raise ValueError("layer must take Euler steps, eq. (15); it has a solver of its own")
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(b, Tensor) for b in batch):
        raise TypeError("batch must be a pair (input of the stack, target) of tensors")
    if isinstance(substeps, bool) or not isinstance(substeps, int) or substeps < 1:
        raise ValueError(f"substeps must be a positive integer, got {substeps!r}")
    x, target = batch
    if x.ndim < 2 or len(x) == 0 or not x.is_floating_point():
        raise ValueError(f"the input must be (B, ...) in floating point, got {tuple(x.shape)} {x.dtype}")
    each = 2 * (len(layer) * substeps + 1) * x[0].numel() * x.element_size()
    if each * len(x) > max_bytes:
        raise ValueError(
            f"states and adjoints of {len(x)} inputs take {each * len(x):.3g} bytes, max_bytes is {max_bytes:.3g}; "
            f"a batch of {max_bytes // each} fits"
        )
    return x, target
