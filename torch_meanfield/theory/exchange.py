r"""Blocks that change places: the velocity of a particle in time, the price of an exchange, and the exchange itself.

In the continuum a particle moves in time with the velocity

.. math:: -\frac{d}{dt}\langle p_t, f(X_t, \theta)\rangle
          = -\langle p_t,\ \nabla f(X_t, \theta)\,F(X_t) - \nabla F(X_t)\,f(X_t, \theta)\rangle,

F the block that acts at t: a Lie bracket, which is also what the exchange of two neighbouring blocks costs to lowest
order. The tau gradient of eq. (15) is another one: there a step is the gap to the predecessor, so moving a block
lengthens its own step and shortens the next one's, and it can pass the next only after that has been switched off.
Source: Lu et al. 2020, (10), (14) and (15).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from torch_meanfield.depth import MeanFieldSequential
from torch_meanfield.observe import undisturbed
from torch_meanfield.theory.continuum import Block, Loss, StreamTrajectory, applied, pulled_back


def time_velocity(where: StreamTrajectory, theta: Block, t: float | Sequence[float] | Tensor) -> Tensor:
    r"""The slope in time of the functional gradient of a block: what the Wasserstein flow moves it down along tau.

    .. math:: \frac{d}{dt} E\langle p_t, f(X_t, \theta)\rangle

    At a node, where the block that acts changes and the slope jumps, it is the mean of both sides.

    Args:
        where: From :func:`.trajectory`; the more substeps, the nearer to the continuum.
        theta: The block f(., theta).
        t: One or more times in [0, T].

    Returns:
        Shaped like ``t``.

    Raises:
        ValueError: A time out of range; a block that changes the shape.

    Source: Lu et al. 2020, (14) with (10).
    """
    times = torch.as_tensor(t, dtype=torch.float64, device="cpu")
    values = []
    for time in times.flatten().tolist():
        sides = [_bracket(theta, where.blocks[k], where.states[s], where.adjoints[p]) for s, p, k in where.cells(time)]
        values.append(torch.stack(sides).mean())
    return torch.stack(values).reshape(times.shape)


def exchange_prices(where: StreamTrajectory, probes: Sequence[StreamTrajectory] = ()) -> Tensor:
    r"""What the exchange of every two neighbours would do to the loss, from one forward and one adjoint pass.

    .. math:: \Delta E_l \approx E\langle p^{l+1}, \delta_l\rangle, \qquad
              \delta_l = A(B(x)) - B(A(x)), \quad x = X^{l-1}

    with A the step that block l takes, B that of block l + 1: now A is first. Each block keeps its step size. This is
    exact to first order in delta, whatever the steps. Near an optimum, and for steps of one, what follows counts more:
    half the loss's Hessian H by delta carried to the output. Each of ``probes`` is one more adjoint pass, with a random
    v of covariance H at the output of each input, and its adjoint q gives that term without bias:

    .. math:: + \tfrac12 E\,\langle q^{l+1}, \delta_l\rangle^2

    Args:
        where: From :func:`.trajectory` with ``substeps=1``.
        probes: From :func:`.trajectory` with ``loss=probe_loss(...)`` on the same input. Blocks must treat the inputs
            of a batch one by one (batch norm in ``eval()``).

    Returns:
        ``(n - 1,)``, in units of the loss; negative where the exchange would lower it.

    Raises:
        ValueError: A trajectory with substeps, a probe of another stack or batch.

    Example:
        >>> from torch_meanfield.theory.continuum import trajectory
        >>> layer = MeanFieldSequential(*(nn.Linear(3, 3) for _ in range(4)), horizon=1.0)
        >>> exchange_prices(trajectory(layer, (torch.randn(8, 3), torch.randn(8, 3)))).shape
        torch.Size([3])
    """
    if len({id(b) for b in where.blocks}) < len(where.blocks):
        raise ValueError("prices are of whole blocks: make the trajectory with substeps=1")
    for probe in probes:
        if probe.states.shape != where.states.shape:
            raise ValueError(f"a probe has states {tuple(probe.states.shape)}, expected {tuple(where.states.shape)}")
    steps = where.times.diff().to(where.states)
    prices = []
    with torch.no_grad(), undisturbed():
        for i in range(len(steps) - 1):
            second = where.states[i] + steps[i + 1] * applied(where.blocks[i + 1], where.states[i])
            delta = second + steps[i] * applied(where.blocks[i], second) - where.states[i + 2]
            price = (where.adjoints[i + 2] * delta).sum()
            for probe in probes:
                inner = (probe.adjoints[i + 2] * delta).flatten(1).sum(1)
                price = price + inner.square().mean() / (2 * len(probes))
            prices.append(price)
    return torch.stack(prices) if prices else steps.new_zeros(0)


def probe_loss(kind: str = "squared", *, head: Block | None = None, seed: int = 0) -> Loss:
    """A random linear functional of the outputs whose covariance is a loss's Hessian, for :func:`exchange_prices`.

    Args:
        kind: ``"squared"``: half the squared distance, of any output; ``"cross_entropy"``: of logits ``(B, k)``.
        head: What stands between the stack and the loss.
        seed: Of the draw.

    Returns:
        A loss for :func:`.trajectory`; it makes no use of the target.

    Raises:
        ValueError: Another kind.

    Source: the estimate of Hutchinson 1990, with a square root of the Gauss-Newton matrix.
    """
    if kind not in ("squared", "cross_entropy"):
        raise ValueError(f"kind must be 'squared' or 'cross_entropy', got {kind!r}")

    def loss(output: Tensor, target: Tensor) -> Tensor:
        out = output if head is None else head(output)
        draw = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), device="cpu", dtype=torch.float64)
        v = draw.to(out)
        if kind == "cross_entropy":  # H = diag(p) - p p^T = R R^T with R = diag(p)^1/2 - p (p^1/2)^T
            p = out.detach().softmax(1)
            v = p.sqrt() * v - p * (p.sqrt() * v).sum(1, keepdim=True)
        return (out * v).sum()

    return loss


def cheap_pairs(prices: Tensor, below: float = 0.0) -> list[int]:
    """Pairs to exchange at once: the cheapest first, none that shares a block with one chosen before.

    Args:
        prices: ``(n - 1,)``, from :func:`exchange_prices`.
        below: Pairs at this price or above are left.

    Returns:
        The places i of pairs (i, i + 1), ascending.
    """
    chosen: set[int] = set()
    values = prices.tolist()
    for i in sorted(range(len(values)), key=values.__getitem__):
        if values[i] < below and chosen.isdisjoint((i - 1, i, i + 1)):
            chosen.add(i)
    return sorted(chosen)


@torch.no_grad()
def exchange_(layer: MeanFieldSequential, pairs: Iterable[int]) -> MeanFieldSequential:
    """Let neighbours i and i + 1 change places for every i in ``pairs``, each with its step size.

    Places alone are written, and the layer re-sorts itself: whatever a particle owns moves along.

    Args:
        layer: The stack, in order.
        pairs: Places of the first of each pair; no block in two pairs.

    Raises:
        ValueError: A place out of range, a block in two pairs. Nothing has changed then.
    """
    chosen, n = sorted(pairs), len(layer)
    for i in chosen:
        if not 0 <= i < n - 1:
            raise ValueError(f"pairs holds {i}; a stack of {n} blocks has the pairs 0 .. {n - 2}")
    for i, j in zip(chosen, chosen[1:], strict=False):
        if j <= i + 1:
            raise ValueError(f"pairs holds {i} and {j}, which share a block; exchange one after the other")
    tau = layer.tau.detach().clone()
    begins = torch.cat([tau.new_zeros(1), tau])
    for i in chosen:
        tau[i], tau[i + 1] = begins[i + 2], begins[i] + (begins[i + 2] - begins[i + 1])
    layer.set_tau_(tau)
    return layer


def _bracket(theta: Block, acting: Block, state: Tensor, adjoint: Tensor) -> Tensor:
    """E<p, grad theta(X) F(X) - grad F(X) theta(X)>, by one vector-Jacobian product of each."""
    with torch.enable_grad():
        x = state.detach().requires_grad_()
        mine, theirs = applied(theta, x), applied(acting, x)
        slopes = [pulled_back(out, x, adjoint) for out in (mine, theirs)]
    return (slopes[0] * theirs.detach() - slopes[1] * mine.detach()).sum()
