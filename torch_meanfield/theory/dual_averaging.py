"""Particle dual averaging: dual averaging over probability measures, as a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from torch_meanfield.theory.langevin import LangevinOptimizer


class ParticleDualAveraging(LangevinOptimizer):
    r"""Minimise a loss of the mean of particles, plus weight decay and entropy, with a convergence rate.

    The functional is :math:`L(h_\mu) + \frac\lambda2\int|\theta|^2 d\mu + T\int\log\mu\,d\mu` with outputs :math:`h_\mu
    = \int h_\theta\,d\mu` on a fixed set of samples. An outer step s evaluates :math:`d^{(s)} = \partial L / \partial
    h` there; by its linear average the potential is averaged as a whole function,

    .. math:: \bar V^{(t)}(\theta) = \sum_{s\le t} \frac{2s}{(t+1)(t+2)}
              \left(\langle d^{(s)}, h_\theta\rangle + \tfrac\lambda2|\theta|^2\right),

    and the particles sample its Gibbs measure :math:`\propto e^{-\bar V^{(t)}/T}` by Langevin steps that start from
    where they are. Outputs on one set of samples are all that is stored, so the closure must use the same samples, in
    the same order, at each call.

    Args:
        params: Parameters or groups of them.
        lr: Time step of the inner Langevin steps, positive.
        temperature: T, positive.
        weight_decay: :math:`\lambda`, positive in theory, at least 0 here.
        particles: n, where the outputs are means over n units: gradients by a unit are multiplied by it.
        inner_steps: Langevin steps in each outer step.
        seed: Seed of the noise, which has a generator of its own.

    Raises:
        TypeError, ValueError: A setting that is no number or out of its range.

    Example:
        >>> theta = torch.zeros(1000, requires_grad=True)
        >>> optimizer = ParticleDualAveraging([theta], lr=0.1, temperature=0.5, weight_decay=1.0, particles=1000)
        >>> def closure():
        ...     outputs = theta.mean()[None]
        ...     return (outputs - 1).square().sum() / 2, outputs
        >>> for _ in range(100):
        ...     loss = optimizer.step(closure)
        >>> abs(theta.mean().item() - 0.5) < 0.1  # the minimiser is N(1/2, T / weight_decay)
        True

    Source: Nitanda, Wu, Suzuki 2020 (arXiv:2012.15477), algorithm 1, with full batches; the rate O(1/t) is theirs.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        temperature: float,
        weight_decay: float = 0.0,
        particles: float = 1,
        inner_steps: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(params, lr, temperature=temperature, weight_decay=weight_decay, particles=particles, seed=seed)
        if float(temperature) == 0:
            raise ValueError(
                f"temperature must be positive, got {temperature!r}: the average is sampled, not minimised"
            )
        if isinstance(inner_steps, bool) or not isinstance(inner_steps, int):
            raise TypeError(f"inner_steps must be an integer, got {inner_steps!r}")
        if inner_steps < 1:
            raise ValueError(f"inner_steps must be at least 1, got {inner_steps}")
        self.inner_steps = inner_steps
        self.outer_steps = 0  #: outer steps done, t
        self._average: Tensor | None = None  # sum_s 2 s d^(s) / ((t + 1)(t + 2))

    @torch.no_grad()
    def step(self, closure: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:  # type: ignore[override]
        """One outer step.

        Args:
            closure: Evaluates the model and returns ``(loss, outputs)``: the outputs on all samples, with their graph,
                and the loss as a function of these. It is called once for the loss and once for each inner step.
                Gradients in ``p.grad`` are neither used nor changed.

        Returns:
            The loss before the step, detached.

        Raises:
            TypeError: No closure, or one that does not return two tensors.
            ValueError: Outputs of another shape than before, or a loss that does not depend on them.
        """
        loss, outputs = self._evaluate(closure)
        if self._average is not None and self._average.shape != outputs.shape:
            raise ValueError(
                f"the outputs have shape {tuple(outputs.shape)}, in the steps before {tuple(self._average.shape)}: the "
                f"closure must use the same samples at each call"
            )
        if not loss.requires_grad or not outputs.requires_grad:
            raise ValueError("loss and outputs must carry their graph; is the closure under torch.no_grad()?")
        (dual,) = torch.autograd.grad(loss, outputs, allow_unused=True)
        if dual is None:
            raise ValueError("the loss does not depend on the outputs that the closure returned with it")
        t = self.outer_steps + 1
        average = torch.zeros_like(dual) if self._average is None else self._average
        self._average = average * (t / (t + 2)) + dual * (2 * t / ((t + 1) * (t + 2)))
        self.outer_steps = t
        wanted = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        for _ in range(self.inner_steps):
            _, outputs = self._evaluate(closure)
            found = torch.autograd.grad(outputs, wanted, self._average, allow_unused=True)
            gradients = dict(zip(wanted, found, strict=True))
            for group in self.param_groups:
                for p in group["params"]:
                    gradient = gradients.get(p)
                    if gradient is not None:
                        self.langevin_step_(p, gradient, group, float(group["weight_decay"]) * t / (t + 2))
        return loss.detach()

    def _evaluate(self, closure: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        if not callable(closure):
            raise TypeError("step needs a closure that returns (loss, outputs): the outputs are what is averaged over")
        with torch.enable_grad():
            made = closure()
        if not isinstance(made, tuple) or len(made) != 2 or not all(isinstance(x, Tensor) for x in made):
            raise TypeError(f"the closure must return two tensors, (loss, outputs); it returned {type(made).__name__}")
        return made

    _kept = ("noise", "dual")

    def _check_own(self, state: dict[str, Any]) -> None:
        dual = state.get("dual")
        if not isinstance(dual, dict) or not {"outer_steps", "average", "inner_steps"} <= dual.keys():
            raise ValueError("the state holds no dual average; it is not one of ParticleDualAveraging.state_dict()")
        super()._check_own(state)

    def _own_state(self) -> dict[str, Any]:
        average = None if self._average is None else self._average.clone()
        dual = {"outer_steps": self.outer_steps, "average": average, "inner_steps": self.inner_steps}
        return {**super()._own_state(), "dual": dual}

    def _load_own(self, state: dict[str, Any]) -> None:
        super()._load_own(state)
        dual = state["dual"]
        self.outer_steps, self.inner_steps = int(dual["outer_steps"]), int(dual["inner_steps"])
        self._average = None if dual["average"] is None else dual["average"].clone()
