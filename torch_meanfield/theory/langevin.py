"""Mean-field Langevin dynamics: noisy gradient descent of particles, as a torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer


class LangevinOptimizer(Optimizer):
    """What the noisy optimizers share: their settings, checked, and generators of their own that checkpoints keep.

    Noise is drawn by one generator for each device, never by the global one.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        temperature: float,
        weight_decay: float = 0.0,
        particles: float = 1,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "temperature": temperature, "weight_decay": weight_decay, "particles": particles}
        check_group(defaults)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an integer, got {seed!r}")
        self._seed = seed
        self._generators: dict[str, torch.Generator] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimizer.

        Raises:
            TypeError, ValueError: A setting that is no number or out of its range, before the group is added.
        """
        if isinstance(param_group, dict):
            check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def langevin_step_(self, p: Tensor, gradient: Tensor, group: dict[str, Any], decay: float) -> None:
        """p <- p - lr (n gradient + decay p) + sqrt(2 lr T) xi, in place."""
        if gradient.is_sparse:
            raise RuntimeError(
                f"{type(self).__name__} takes no sparse gradients: every particle moves in every step; use "
                f"nn.Embedding(sparse=False)"
            )
        lr = float(group["lr"])
        p.mul_(1 - lr * decay).add_(gradient, alpha=-lr * float(group["particles"]))
        noise = math.sqrt(2 * lr * float(group["temperature"]))
        if noise:
            p.add_(
                torch.randn(p.shape, generator=self._generator(p.device), device=p.device, dtype=p.dtype), alpha=noise
            )

    def _generator(self, device: torch.device) -> torch.Generator:
        if str(device) not in self._generators:
            self._generators[str(device)] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[str(device)]

    # -- checkpoints and copies ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer knows, the state of its generators included."""
        return {**super().state_dict(), **self._own_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state.

        Raises:
            ValueError: A state of another optimizer, before anything is changed.
        """
        self._check_own(state_dict)
        super().load_state_dict({k: v for k, v in state_dict.items() if k in ("state", "param_groups")})
        self._load_own(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **self._own_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = {key: state.pop(key) for key in self._kept if key in state}
        super().__setstate__(state)
        if own:  # torch calls this to load a plain state too
            self._load_own(own)

    # A subclass that keeps more extends these three, and names its key here.
    _kept: tuple[str, ...] = ("noise",)

    def _check_own(self, state: dict[str, Any]) -> None:
        noise = state.get("noise")
        if not isinstance(noise, dict) or not {"seed", "generators"} <= noise.keys():
            raise ValueError(
                f"the state holds no generators (its keys are {sorted(map(str, state))}); it is not one of "
                f"{type(self).__name__}.state_dict()"
            )

    def _own_state(self) -> dict[str, Any]:
        states = {device: g.get_state() for device, g in self._generators.items()}
        return {"noise": {"seed": self._seed, "generators": states}}

    def _load_own(self, state: dict[str, Any]) -> None:
        self._seed = int(state["noise"]["seed"])
        self._generators = {}
        for device, own in state["noise"]["generators"].items():
            self._generator(torch.device(device)).set_state(own.cpu())


class MeanFieldLangevin(LangevinOptimizer):
    r"""Noisy gradient descent of the particles of a mean-field network: the Wasserstein flow of its free energy.

    .. math:: \theta_i \leftarrow \theta_i - \eta\left(n\,\nabla_{\theta_i} E + \lambda\theta_i\right)
              + \sqrt{2\eta T}\;\xi_i, \qquad \xi_i \sim N(0, I)

    The minimised functional of the particles' law is :math:`E[\mu] + \frac\lambda2 \int|\theta|^2 d\mu + T \int
    \log\mu \,d\mu`; for a convex E it has one minimiser, :math:`\mu_* \propto \exp(-(V(\theta, \mu_*) +
    \frac\lambda2|\theta|^2) / T)`, to which the law converges at a rate :math:`e^{-2 T \alpha t}`, alpha the
    log-Sobolev constant of such Gibbs measures.

    Args:
        params: Parameters or groups of them, as for any optimizer.
        lr: The time step :math:`\eta`, positive.
        temperature: T, at least 0; with :math:`T = \sigma^2 / 2` for noise of amplitude sigma.
        weight_decay: :math:`\lambda`, at least 0. It confines; without it (or an energy that confines) there is no
            minimiser.
        particles: n, by which gradients are multiplied: where the network is the *mean* of n units, the gradient of its
            loss by one of them is 1/n times that of the potential.
        seed: Seed of the noise, which has a generator of its own.

    Raises:
        TypeError, ValueError: A setting that is no number or out of its range.

    Example:
        >>> theta = torch.zeros(1000, requires_grad=True)  # a thousand particles; E = (mean - 1)^2 / 2
        >>> optimizer = MeanFieldLangevin([theta], lr=0.1, temperature=0.5, weight_decay=1.0, particles=1000)
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     ((theta.mean() - 1) ** 2 / 2).backward()
        ...     _ = optimizer.step()
        >>> abs(theta.mean().item() - 0.5) < 0.1  # the minimiser is N(1/2, T / weight_decay)
        True

    Source: Hu, Ren, Siska, Szpruch 2019 (arXiv:1905.07769); Nitanda, Wu, Suzuki 2022 for the rate.
    """

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; parameters without a gradient stay.

        Args:
            closure: Evaluates the model anew and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.langevin_step_(p, p.grad, group, float(group["weight_decay"]))
        return loss


def check_group(group: dict[str, Any]) -> None:
    """Raise ``TypeError`` or ``ValueError`` for settings that are no numbers or out of their range."""
    for name, positive in (("lr", True), ("temperature", False), ("weight_decay", False), ("particles", True)):
        value = group[name]
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        number = float(value)
        if not math.isfinite(number) or number < 0 or (positive and number == 0):
            raise ValueError(f"{name} must be finite and {'positive' if positive else 'at least 0'}, got {value!r}")
