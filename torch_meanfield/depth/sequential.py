"""``MeanFieldSequential``: residual branches as exchangeable particles, executed in the order of their times tau."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torch_meanfield._torch import children_of
from torch_meanfield.depth.euler import checked, euler_step, euler_steps
from torch_meanfield.depth.exchangeable import check_alike, check_exchangeable
from torch_meanfield.depth.layer import MeanFieldLayer
from torch_meanfield.depth.tau_axis import check_horizon, differences, nonnegative, projected, steps_by_slot
from torch_meanfield.particles import Population, Slice, Stack
from torch_meanfield.particles.population import Column, named_tensors
from torch_meanfield.particles.traits import Traits


class MeanFieldSequential(MeanFieldLayer):
    r"""A stack of residual branches with learnable times: the drop-in layer.

    .. math:: X^{l} = X^{l-1} + (\tau^l - \tau^{l-1})\, f(X^{l-1}, \theta^l), \qquad l = 1..n,\quad \tau^0 = 0

    with the particles :math:`(\theta_i, \tau_i)` in the order of tau (Lu et al. 2020, eq. (15) and Algorithm 1). After
    each optimizer step that changed their order, they are re-sorted in place: parameters, buffers, gradients and
    optimizer state move together, so that branch l always holds the l-th particle. Nothing is added to the training
    loop. ``set_automatic_resort(model, False)`` switches this off, ``resort_(model)`` does it by hand.

    At the horizon T = n re-sorts are rare: a step is the gap to the predecessor, so two neighbours can pass each other
    only where one of them is switched off, and on the way the loss of a trained 48-block network rises by 19 times (the
    median pair) what the exchange itself costs. Their tau gradient hardly sees the exchange either, it is all but
    uncorrelated with the slope in time that the continuum has (``theory.time_velocity``, ``docs/theory``).

    Args:
        *branches: n modules that map x to its own shape, alike in structure; not the identity path.
        horizon: the last time T. Steps begin at T / n. ``None`` means n: every step is exactly 1.0 and the fresh
            layer gives the bits of the ordinary residual stack.
        tau_init: ``"uniform"``: the grid T/n, 2T/n, ..., T; ``"random"``: n sorted draws from U(0, T).
        learn_tau: ``False`` fixes the positions and leaves the ordinary residual stack (at ``horizon=None`` without
            any multiplication).
        solver: how one particle moves the stream: a function of ``x``, the branch and its step size (a tensor of shape
            ``()``) that returns the next ``x``. :func:`~torch_meanfield.depth.euler.euler_step` is eq. (15).

    Shape:
        input and output: any shape that the branches keep.

    Attributes:
        auto_resort: whether an optimizer step re-sorts this layer.
        grad_checkpointing: recompute each branch in the backward pass.

    Raises:
        ValueError: no branch, branches that differ in structure or share tensors, a horizon that is not positive,
            an unknown ``tau_init``.
        TypeError: a branch that is not a module, or a horizon that is not a number.

    Example:
        >>> layer = MeanFieldSequential(*(nn.Linear(8, 8) for _ in range(4)))
        >>> layer(torch.randn(2, 8)).shape, layer.steps().tolist()
        (torch.Size([2, 8]), [1.0, 1.0, 1.0, 1.0])
    """

    solver: Callable[[Tensor, nn.Module, Tensor], Tensor] = staticmethod(euler_step)  # of a layer pickled by 0.1

    def __init__(
        self,
        *branches: nn.Module,
        horizon: float | None = None,
        tau_init: Literal["uniform", "random"] = "uniform",
        learn_tau: bool = True,
        solver: Callable[[Tensor, nn.Module, Tensor], Tensor] = euler_step,
    ) -> None:
        check_exchangeable(branches)
        if tau_init not in ("uniform", "random"):
            raise ValueError(f"tau_init must be 'uniform' or 'random', got {tau_init!r}")
        n = len(branches)
        checked_horizon = check_horizon(horizon, n)
        super().__init__()
        for i, branch in enumerate(branches):
            self.add_module(str(i), branch)
        self._place_on_axis(n, checked_horizon, next(branches[0].parameters(), None), learn=learn_tau)
        self.grad_checkpointing = False
        self.solver = solver
        if tau_init == "random":
            self.draw_tau_()

    # -- positions ---------------------------------------------------------------------------------------------

    @property
    def tau(self) -> Tensor:
        """The n positions, ascending and differentiable; shape ``(n,)``, float32 (float64 in a double model)."""
        positions = self.tau_axis.positions()
        order = self._execution_order()
        return positions if order is None else projected(positions)[order]

    def population(self) -> Population:
        """The branches as particles: each owns one tensor of every name in a branch, and its place on the tau axis."""
        tensors = [{f"0.{name}": t for name, t in named_tensors(branch).items()} for branch in self]
        check_alike([(branch,) for branch in self], tensors, self._label())
        names = {id(t): name for name, t in tensors[0].items()}.values()  # a tensor tied inside a branch counts once
        columns: list[Column] = [Stack([t[name] for t in tensors]) for name in names]
        columns += [Slice(t) for t in named_tensors(self.tau_axis).values()]
        traits = Traits([list(branch.modules()) for branch in self])
        return Population(columns, owner=self, name=self._label(), traits=traits)

    # -- the forward pass --------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Run eq. (15) from ``x``; the result has the shape of ``x``."""
        euler = self.solver is euler_step
        recomputes = self.grad_checkpointing and self.training and torch.is_grad_enabled()
        if euler and self.tau_axis.has_unit_steps():
            for i, branch in enumerate(self):
                x = _recomputed(_plain_step, x, branch, i) if recomputes else _plain_step(x, branch, i)
            return x
        order = self._execution_order()
        tau = self.tau_axis.positions()
        if order is not None:
            each = differences(projected(tau)[order])
        else:  # compiled code runs the branches by slot, unread
            each = steps_by_slot(tau) if torch.compiler.is_compiling() else nonnegative(differences(tau))
        steps = each.unbind()
        branches = self._branches() if order is None else [self[i] for i in order]
        if euler and not recomputes:
            return euler_steps(x, branches, steps)
        for branch, step in zip(branches, steps, strict=True):
            x = _recomputed(self.solver, x, branch, step) if recomputes else self.solver(x, branch, step)
        return x

    # -- a sequence of branches --------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.tau_axis.anchor.numel()

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._branches())

    def _branches(self) -> list[nn.Module]:
        blocks = children_of(self)
        branches = [blocks.get(str(i)) for i in range(len(self))]
        if len(blocks) != len(branches) + 1 or None in branches:  # and the tau axis
            raise self._fixed()
        return cast("list[nn.Module]", branches)

    def take_out_(self, size: int, undo: ExitStack) -> None:
        """See :meth:`.MeanFieldLayer.take_out_`."""
        blocks = children_of(self)
        undo.callback(blocks.update, dict(blocks))
        undo.callback(blocks.clear)
        for name in [n for n in blocks if n.isdigit() and int(n) >= size]:
            del blocks[name]

    def append(self, *args: Any) -> None:
        """Not possible: a layer keeps its number of branches."""
        raise self._fixed()

    insert = extend = pop = __delitem__ = append

    def _fixed(self) -> RuntimeError:
        names = [name for name in children_of(self) if name != "tau_axis"]
        return RuntimeError(
            f"{self._label()}: a layer keeps the {len(self)} branches that its tau axis has places for, and it holds "
            f"{names}; make another of them, MeanFieldSequential(*branches), and place them by set_tau_"
        )

    def __getitem__(self, i: int) -> nn.Module:
        """The branch in slot i: the i-th particle in the order of tau."""
        n = len(self)
        if not isinstance(i, int) or isinstance(i, bool):
            raise TypeError(f"a branch is indexed by an integer, got {type(i).__name__}")
        if not -n <= i < n:
            raise IndexError(f"branch {i} is out of range for {n} branches")
        return cast(nn.Module, children_of(self)[str(i % n)])

    def _loaded(self, incompatible_keys: Any) -> None:
        self.tau_axis.unit_steps = self.tau_axis.unit_steps and bool((self.steps() == 1).all())
        super()._loaded(incompatible_keys)


def _recomputed(step: Callable[..., Tensor], *args: Any) -> Tensor:
    return checkpoint(step, *args, use_reentrant=False)  # type: ignore[no-any-return, unused-ignore]


def _plain_step(x: Tensor, branch: nn.Module, i: int) -> Tensor:
    return x + checked(x, branch(x), branch, i)
