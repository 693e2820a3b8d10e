r"""Markov decisions with an entropy: what a policy is worth, and the best one, exactly.

With finitely many states and actions, temperature :math:`\tau` and the uniform policy u, a policy is worth

.. math:: V^\pi(s) = E\sum_t \gamma^t \Big( r(s_t, a_t) - \tau \log\frac{\pi(a_t|s_t)}{u(a_t)} \Big), \qquad s_0 = s.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Decisions(NamedTuple):
    """A Markov decision problem; float64. A bandit has one state, and any discount.

    Attributes:
        reward: ``(S, A)``.
        transition: Probabilities of the next state, ``(S, A, S)``.
        discount: gamma, in [0, 1).
        start: Probabilities of the first state, ``(S,)``.
    """

    reward: Tensor
    transition: Tensor
    discount: float
    start: Tensor

    @classmethod
    def bandit(cls, reward: Tensor) -> Decisions:
        """One decision, rewards ``(A,)``.

        Raises:
            ValueError: Rewards that are not a vector of finite numbers.
        """
        if reward.dim() != 1:
            raise ValueError(f"reward must be (A,) for a bandit, got shape {tuple(reward.shape)}")
        one = reward.double().new_ones(1, len(reward), 1)
        return cls(reward.double()[None], one, 0.0, one[0, 0]).checked()

    def checked(self) -> Decisions:
        """This in float64, if it is a decision problem.

        Raises:
            ValueError: Shapes that do not fit, rewards that are not finite, probabilities that are negative or do not
                sum to 1, a discount outside [0, 1).
        """
        if self.reward.dim() != 2 or not bool(torch.isfinite(self.reward).all()):
            raise ValueError(f"reward must be (S, A) and finite, got shape {tuple(self.reward.shape)}")
        states, actions = self.reward.shape
        if self.transition.shape != (states, actions, states) or self.start.shape != (states,):
            raise ValueError(
                f"transition must be {(states, actions, states)} and start {(states,)}, got "
                f"{tuple(self.transition.shape)} and {tuple(self.start.shape)}"
            )
        for name, p in (("transition", self.transition), ("start", self.start)):
            if not bool((p >= 0).all() and ((p.sum(-1) - 1).abs() < 1e-6).all()):
                raise ValueError(f"{name} must hold probabilities: at least 0, and of sum 1 over the last dimension")
        if not 0 <= self.discount < 1:
            raise ValueError(f"discount must be in [0, 1), got {self.discount!r}")
        return Decisions(self.reward.double(), self.transition.double(), self.discount, self.start.double())


class Worth(NamedTuple):
    """What a policy is worth.

    Attributes:
        value: V, ``(S,)``.
        advantage: :math:`Q - \\tau\\log(\\pi/u) - V`, ``(S, A)``; its mean under the policy is 0.
        visits: How often a state is seen, discounted, from the start: ``(S,)``, of sum 1 / (1 - gamma).
        total: The mean of V over the start.
    """

    value: Tensor
    advantage: Tensor
    visits: Tensor
    total: Tensor


def soft_worth(decisions: Decisions, logits: Tensor, temperature: float) -> Worth:
    r"""Evaluate the policy softmax(``logits``), by two linear systems; differentiable in ``logits``.

    Args:
        decisions: The problem.
        logits: ``(S, A)``.
        temperature: :math:`\tau`, at least 0.

    Raises:
        ValueError: A problem that is none (:meth:`Decisions.checked`), logits of another shape, a negative temperature.

    Source: Kerimkulov, Leahy, Siska, Szpruch 2022 (arXiv:2201.07296), the entropy-regularised value, occupancy measure
    and the policy gradient's advantage.
    """
    decisions = decisions.checked()
    _check_temperature(temperature, least=0.0)
    if logits.shape != decisions.reward.shape:
        raise ValueError(f"logits must be {tuple(decisions.reward.shape)}, got shape {tuple(logits.shape)}")
    log_policy = torch.log_softmax(logits.double(), -1)
    policy = log_policy.exp()
    gain = decisions.reward - temperature * (log_policy + math.log(logits.shape[1]))
    move = torch.einsum("sa,sat->st", policy, decisions.transition)
    system = torch.eye(len(move), dtype=move.dtype, device=move.device) - decisions.discount * move
    value = torch.linalg.solve(system, (policy * gain).sum(1))
    visits = torch.linalg.solve(system.T, decisions.start)
    advantage = gain + decisions.discount * decisions.transition @ value - value[:, None]
    return Worth(value, advantage, visits, decisions.start @ value)


def soft_optimum(decisions: Decisions, temperature: float) -> Tensor:
    r"""The best policy's logits, ``(S, A)``: the Gibbs policy :math:`\pi_* \propto e^{Q_* / \tau}`.

    A bandit's is :math:`r / \tau`, worth :math:`\tau \log \frac1A\sum_a e^{r_a/\tau}`. Otherwise by policy iteration,
    whose error is squared in each turn.

    Raises:
        ValueError: As :func:`soft_worth`, or a temperature of 0.

    Source: Kerimkulov, Leahy, Siska, Szpruch 2022, the Gibbs form of the maximiser; Geist, Scherrer, Pietquin 2019 for
    the iteration.
    """
    _check_temperature(temperature, least=0.0)
    if temperature == 0:
        raise ValueError("temperature must be positive: without entropy the best policy has no Gibbs form")
    logits = torch.zeros_like(decisions.reward, dtype=torch.float64)
    for _ in range(1000):
        worth = soft_worth(decisions, logits, temperature)
        change = worth.advantage / temperature
        logits = torch.log_softmax(logits, -1) + change
        if bool((change - change.mean(-1, keepdim=True)).abs().max() < 1e-12 * (1 + logits.abs().max())):
            break
    return logits


def _check_temperature(value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ValueError(f"temperature must be finite and at least {least:g}, got {value!r}")
